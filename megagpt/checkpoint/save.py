"""Save a step, on all ranks together. It counts only once it is committed (commit.py).

Every rank writes and hashes its own files; when all have, rank 0 commits. Only then are older steps rotated.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagpt.atomic_files import write_atomically
from megagpt.checkpoint.async_writer import Writer
from megagpt.checkpoint.commit import (
    disk_errors,
    step_folder,
    update_latest_and_best,
    write_commit,
    write_rank_manifest,
)
from megagpt.checkpoint.finite import refuse_not_finite
from megagpt.checkpoint.identity import Identity
from megagpt.checkpoint.rng import rng_state
from megagpt.checkpoint.rotation import remove, rotate
from megagpt.config.schema import KeepConfig
from megagpt.data.mixture import Mixture
from megagpt.distributed.collectives import errors_on_every_rank, gather_objects
from megagpt.distributed.process_group import is_main, rank
from megagpt.engine.build import Engine
from megagpt.engine.state_files import files_to_save
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train_state import TrainState


@dataclass(frozen=True)
class RunRecord:
    """The constant part of a run's checkpoints: folder, retention, identity, tokenizer, run file."""

    out_dir: Path
    keep: KeepConfig
    identity: Identity
    tokenizer: Tokenizer
    effective: dict[str, Any]  # the run file with all defaults written out


def save(engine: Engine, state: TrainState, mixture: Mixture, record: RunRecord, writer: Writer) -> None:
    """Write and commit one step, then rotate; an asynchronous writer does all that after this returns. Collective.

    Raises UserError, on every rank, if the state of one of them is not finite or a file of it cannot be written, now or
    in the save before: the previous step stays the newest.
    """
    writer.wait()
    step_dir = step_folder(record.out_dir, state.step)
    files = files_to_save(engine, step_dir)
    files[step_dir / f"rng.{rank()}.json"] = json.dumps(rng_state()).encode()
    if is_main():
        files[step_dir / "run.json"] = json.dumps(record.effective, indent=1).encode()
        files[step_dir / "tokenizer.model"] = record.tokenizer.model_bytes

    def write_and_commit(files: dict[Path, Any]) -> None:
        group = writer.group
        with errors_on_every_rank(group):
            refuse_not_finite(step_dir, files)
        with errors_on_every_rank(group):
            _make_room(step_dir)
        with errors_on_every_rank(group):
            write_files(step_dir, files)
        with errors_on_every_rank(group), disk_errors(step_dir):
            manifest = write_rank_manifest(step_dir, rank())
        manifests = gather_objects(manifest, group)
        with errors_on_every_rank(group):
            _commit(step_dir, state, mixture, record.identity, manifests)
        rotate(record.out_dir, step_dir, state, record.keep, group)

    writer.start(files, write_and_commit)


def _make_room(step_dir: Path) -> None:
    if is_main():
        with disk_errors(step_dir):
            if step_dir.exists():  # left by an attempt that died while it saved
                remove(step_dir)
            step_dir.mkdir(parents=True)


def write_files(step_dir: Path, files: dict[Path, Any]) -> None:
    """Write bytes as they are and everything else as torch.save does. Raises UserError for an error of the disk."""
    with disk_errors(step_dir):
        for path, content in files.items():
            if isinstance(content, bytes):
                write_atomically(path, content)
            else:
                write_state(path, content)


def write_state(path: Path, state: Any) -> None:
    """Do as torch.save does, but raise an error of the disk as the OSError that it was."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # after an OSError torch still finishes the zip file, which fails again and hides the first error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _commit(step_dir: Path, state: TrainState, mixture: Mixture, identity: Identity, manifests: list[str]) -> None:
    if is_main():
        with disk_errors(step_dir):
            write_commit(step_dir, state, mixture, identity, manifests, finite=True)  # refused above if not
        try:
            update_latest_and_best(step_dir.parent.parent, step_dir, state)
        except OSError as error:
            raise UserError(
                f"checkpoint {step_dir} was saved, but the `latest` pointer could not be updated ({error}); fix the "
                "disk and give the same command: it resumes from this checkpoint"
            ) from error
