"""Ends a chain of restarts that gets nowhere: a batch system would go on with it for as long as it is allowed to."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megagpt.atomic_files import write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.distributed.collectives import broadcast_object, on_every_rank
from megagpt.distributed.process_group import is_main
from megagpt.errors import UserError, writing_to

MAX_IN_VAIN = 3  # restarts in a row without a step forward


def record_start(run: RunConfig, saved_step: int) -> None:
    """Record in out_dir/starts.json how far the starts before this one came; `saved_step` is where it goes on.

    A start was in vain if no step was saved or logged after it that had not been reached before it. A run that is
    killed between saves thus goes on as long as it sometimes comes further, and a changed run file is counted anew.
    Collective; raises UserError at the third restart in a row after a start in vain, before any weights are loaded.
    """
    on_every_rank(lambda: _count(run, saved_step) if is_main() else None)


def is_requeued_start(out_dir: Path) -> bool:
    """Whether this is a restart of a Slurm job that has begun the run in out_dir: if so, it is not to begin it again.

    Collective.
    """
    record = broadcast_object(_read(out_dir / "starts.json"))
    return record is not None and "SLURM_RESTART_COUNT" in os.environ and record["job"] == os.environ["SLURM_JOB_ID"]


def undo_start(run: RunConfig) -> None:
    """A refused run file is no start: it leaves nothing where nothing was."""
    out_dir = run.megagpt.out_dir
    if is_main() and [path.name for path in out_dir.iterdir()] == ["starts.json"]:
        (out_dir / "starts.json").unlink()
        out_dir.rmdir()


def _count(run: RunConfig, saved_step: int) -> None:
    out_dir = run.megagpt.out_dir
    file = out_dir / "starts.json"
    digest = hashlib.sha256(json.dumps(run.as_json(), sort_keys=True).encode()).hexdigest()
    reached = max(saved_step, last_logged(out_dir / "metrics.jsonl"))
    before = _read(file)
    if before is None or before["run"] != digest or reached > before["reached"]:
        in_vain = 0
    else:
        in_vain, reached = before["in_vain"] + 1, before["reached"]
    with writing_to(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        record = {"run": digest, "reached": reached, "in_vain": in_vain, "job": os.environ.get("SLURM_JOB_ID")}
        write_atomically(file, json.dumps(record).encode())
    if in_vain >= MAX_IN_VAIN:
        raise UserError(
            f"the last {in_vain} starts of {out_dir} came no further than step {reached}; see in their logs what ended "
            f"them, and mend it. A changed run file is tried anew; to try this one again, remove {file}"
        )


def last_logged(metrics_file: Path) -> int:
    """The step of the last row that was written whole; 0 if there is none."""
    for line in reversed(metrics_file.read_bytes().splitlines() if metrics_file.is_file() else []):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
        return record if {"run", "reached", "in_vain", "job"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
