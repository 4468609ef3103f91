"""Read and write metrics.jsonl, in which every logged number of a run is kept: one row of JSON for each time.

A row is {"step", "tokens_seen", "time": seconds since 1970, NAME: value, ...}. TensorBoard and trackers show the same
numbers under the same names. A name begins with its group: train, val, optim, perf, data, cluster or
tasks.

The texts that a run generates are in samples.jsonl, one in each row: {"step", "time", "prompt", "continuation"}.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.atomic_files import append_whole, write_atomically

Row = dict[str, Any]
# Names of files in a run's folder.
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

# The names of rows that an older megagpt wrote -> today's.
RENAMED = {
    "loss/train": "train/loss",
    "loss/val": "val/loss",
    "perplexity": "val/perplexity",
    "bits_per_byte": "val/bits_per_byte",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped_steps": "optim/skipped_steps",
    "epoch": "data/epoch",
    "tokens_per_sec": "perf/tokens_per_sec",
    "mfu": "perf/mfu",
    "hfu": "perf/hfu",
    "memory_gib": "perf/memory_gib",
    "seconds/step": "perf/seconds_per_step",
    "seconds/data": "data/wait_seconds_per_step",
    "seconds/eval": "perf/eval_seconds",
    "seconds/sample": "perf/sample_seconds",
    "seconds/save": "perf/save_seconds",
    "seconds/write": "perf/write_seconds",
}
# Those that were sums over the steps since the row before.
SUMS = ("seconds/step", "seconds/data")
# The names of each named validation set's losses begin so.
LOSS_OF_SET = "val/loss/"
# What a row holds besides metrics.
AXES = ("step", "tokens_seen", "time")


def read_rows(metrics_file: Path) -> list[Row]:
    """Return a run's rows under today's names; none if there is no file. A row that a crash cut short is left out."""
    return list(_renamed(row for _, row in _parsed(metrics_file)))


def metrics_of(row: Row) -> dict[str, float]:
    """Return the finite metrics of a row: one that was not finite is null."""
    return {name: value for name, value in row.items() if name not in AXES and value is not None}


def keep_up_to(metrics_file: Path, step: int) -> list[Row]:
    """Drop rows after `step`, which a resumed run writes again, and rename those of older versions; return the rows."""
    if not metrics_file.exists():
        metrics_file.parent.mkdir(parents=True, exist_ok=True)
        return []
    kept = [(line, row) for line, row in _parsed(metrics_file) if row["step"] <= step]
    rows = list(_renamed(row for _, row in kept))
    # A row that keeps its names keeps its bytes.
    lines = [line if old.keys() == row.keys() else _line(row) for (line, old), row in zip(kept, rows, strict=True)]
    write_atomically(metrics_file, b"".join(lines))
    return rows


def new_row(step: int, tokens_seen: int, metrics: Mapping[str, float]) -> Row:
    """Return the row of metrics that are known now. One that is not finite becomes null, as JSON has no such number."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"step": step, "tokens_seen": tokens_seen, "time": round(time.time(), 3), **finite}


def append_row(metrics_file: Path, row: Row) -> None:
    """Append a whole row or, if the disk takes no more, nothing."""
    append_whole(metrics_file, _line(row))


def append_samples(samples_file: Path, samples: Sequence[tuple[str, str]], step: int) -> None:
    """Append generated texts, each a prompt and its continuation; all of them or, if the disk takes no more, none."""
    at = {"step": step, "time": round(time.time(), 3)}
    rows = [at | {"prompt": prompt, "continuation": continuation} for prompt, continuation in samples]
    append_whole(samples_file, b"".join(map(_line, rows)))


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _parsed(metrics_file: Path) -> Iterator[tuple[bytes, Row]]:
    for line in metrics_file.read_bytes().splitlines(keepends=True) if metrics_file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row


def _renamed(rows: Iterable[Row]) -> Iterator[Row]:
    """Give rows today's names, and the seconds of a step for the sums of older versions."""
    last = 0  # the last row of training steps
    for row in rows:
        steps = max(1, row["step"] - last)
        yield {
            RENAMED.get(name, name): value / steps if name in SUMS and value is not None else value
            for name, value in row.items()
        }
        if not row.keys().isdisjoint(("seconds/step", RENAMED["seconds/step"])):
            last = row["step"]
