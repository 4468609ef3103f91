"""Tell what a run's own val/loss was, where it read fewer tokens than `megagpt evaluate` does without options."""

import json
from collections.abc import Mapping
from pathlib import Path

from megagpt.checkpoint.commit import read_commit, run_of
from megagpt.checkpoint.weights_folder import origin_of
from megagpt.config.validation_sets import sets_of
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.terminal import typed


def loss_in_run(step_dir: Path, tokens: Mapping[str, int]) -> str:
    """Return a line on the run's val/loss of a step; empty if it was on the same tokens, or is not known.

    `tokens`: how many were predicted now in each of the run's validation sets.
    """
    if origin_of(step_dir) is not None:
        return ""
    section = json.loads((step_dir / "run.json").read_bytes())["megagpt"]
    limits: dict[str, int | None] = {}  # of the sets that val/loss is the mean of
    for name, one in sets_of(section, deciding=True).items():
        limit = one.get("tokens") or section["data"].get("val_tokens")
        limits[name] = limit if limit and limit <= tokens[name] else None
    step = read_commit(step_dir).state.step
    losses = [row.get("val/loss") for row in read_rows(run_of(step_dir) / METRICS) if row["step"] == step]
    loss = next((loss for loss in losses if loss is not None), None)
    if loss is None or not any(limits.values()):
        return ""
    was = f"in the run, val/loss of this step was {loss:.4f}, on"
    [(name, limit), *others] = limits.items()
    if any(other != limit for _, other in others):
        parts = [f"the first {n:,} tokens of {name}" if n else f"all of {name}" for name, n in limits.items()]
        return f"{was} {' and '.join(parts)}"
    where = " of each set" if others else f" of {name}" if name else ""
    data = f"--data {typed(name)} " if len(limits) < len(tokens) else ""
    return f"{was} the first {limit:,} tokens{where}, which {data}--tokens {limit} reads alone"
