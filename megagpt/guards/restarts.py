"""End a chain of restarts without progress, which a batch system would repeat for as long as it is allowed to."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megagpt.atomic_files import write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.distributed.collectives import broadcast_object, errors_on_every_rank, gather_objects
from megagpt.distributed.launcher import torchruns_agent
from megagpt.distributed.process_group import is_main
from megagpt.engine.compilation import KERNELS
from megagpt.errors import UserError, writing_to
from megagpt.file_lock import LOCK

MAX_WITHOUT_PROGRESS = 3  # restarts in a row


@contextmanager
def recorded_start(run: RunConfig, saved_step: int) -> Iterator[None]:
    """Record in out_dir/starts.json how far earlier starts came; `saved_step` is the step that this one resumes from.

    A UserError in the `with` block, which refuses the run file, removes the record of a first start: nothing is left.
    A start made no progress if no step was saved or logged after it that had not been reached before it. So a run that
    is killed between saves may be restarted as long as it sometimes comes further. A changed run file resets the count.
    Collective; raises UserError at the third restart in a row without progress, before any weights are loaded.
    """
    agents = _agents()
    with errors_on_every_rank():
        if is_main():
            _count(run, saved_step, agents)
    try:
        yield
    except UserError:
        _undo(run)
        raise


def is_requeued_start(out_dir: Path) -> bool:
    """Tell whether Slurm or torchrun restarted what began the run in out_dir: `--fresh` must not begin it twice.

    Collective.
    """
    record, agents = _read(out_dir / "starts.json"), _agents()
    if record is None:
        return broadcast_object(False)
    job = os.environ.get("SLURM_JOB_ID")
    requeued = "SLURM_RESTART_COUNT" in os.environ and job is not None and record["job"] == job
    # A host may have been replaced since: one of them is enough.
    return broadcast_object(requeued or not set(agents).isdisjoint(record["agents"]))


def _agents() -> list[str]:
    """Return the torchruns that started the ranks, one on each host; none with another launcher. Collective."""
    return sorted(set(gather_objects(torchruns_agent())) - {""})


def _undo(run: RunConfig) -> None:
    """Remove starts.json if it is all there is besides the run's lock: a refused run file leaves nothing behind."""
    out_dir = run.megagpt.out_dir
    if not is_main():
        return
    with suppress(OSError):
        (out_dir / KERNELS).rmdir()  # only if nothing was compiled
    if {path.name for path in out_dir.iterdir()} <= {"starts.json", LOCK}:
        (out_dir / "starts.json").unlink()


def _count(run: RunConfig, saved_step: int, agents: list[str]) -> None:
    out_dir = run.megagpt.out_dir
    file = out_dir / "starts.json"
    digest = hashlib.sha256(json.dumps(run.as_json(), sort_keys=True).encode()).hexdigest()
    reached = max(saved_step, last_logged(out_dir / "metrics.jsonl"))
    before = _read(file)
    if before is None or before["run"] != digest or reached > before["reached"]:
        without_progress = 0
    else:
        without_progress, reached = before["in_vain"] + 1, before["reached"]
    with writing_to(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        record = {"run": digest, "reached": reached, "in_vain": without_progress}
        record |= {"job": os.environ.get("SLURM_JOB_ID"), "agents": agents}
        write_atomically(file, json.dumps(record).encode())
    if without_progress >= MAX_WITHOUT_PROGRESS:
        raise UserError(
            f"restarts without progress: the last {without_progress} starts of {out_dir} did not get past step "
            f"{reached}; their logs show why. Change the run file, or remove {file} to try again"
        )


def last_logged(metrics_file: Path) -> int:
    """Return the step of the last complete row; 0 if there is none."""
    for line in reversed(metrics_file.read_bytes().splitlines() if metrics_file.is_file() else []):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = {"agents": []} | json.loads(file.read_bytes())  # older versions recorded no agents
        return record if {"run", "reached", "in_vain", "job"} <= record.keys() else None
    except (OSError, ValueError, TypeError):
        return None
