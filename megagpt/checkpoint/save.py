"""Save a step, together on all ranks. It counts only once it is committed (commit.py).

Every rank writes and hashes its own files; when all have, rank 0 commits. Loading picks the newest step whose commit
and files verify, the same one on every rank.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

from megagpt.checkpoint.async_writer import Writer, write_files
from megagpt.checkpoint.commit import (
    disk_errors,
    folder,
    step_folder,
    update_latest_and_best,
    write_commit,
    write_manifest,
)
from megagpt.checkpoint.identity import Identity
from megagpt.checkpoint.rng import rng_state
from megagpt.checkpoint.rotation import remove, rotate
from megagpt.config.schema import KeepConfig
from megagpt.data.mixture import Mixture
from megagpt.data.tokenizer import Tokenizer
from megagpt.distributed.collectives import gather_objects, on_every_rank
from megagpt.distributed.process_group import is_main, print_rank0, rank
from megagpt.engine.build import Engine
from megagpt.engine.state_files import files_to_save
from megagpt.errors import UserError
from megagpt.train_state import TrainState


def save(
    engine: Engine,
    state: TrainState,
    mixture: Mixture,
    identity: Identity,
    tokenizer: Tokenizer,
    effective: dict[str, Any],
    writer: Writer,
) -> None:
    """Write and commit one step, or let the writer do so beside training; collective. Older steps go only after that.

    `effective` is the run file with all defaults written out. Raises UserError, on every rank, if a file of one of
    them cannot be written, now or by the save before: the step before stands.
    """
    writer.wait()
    out_dir, keep = Path(effective["megagpt"]["out_dir"]), KeepConfig(**effective["megagpt"]["keep"])
    step_dir = step_folder(out_dir, state.step)
    on_every_rank(lambda: _make_room(step_dir))
    files = files_to_save(engine, step_dir)
    files[step_dir / f"rng.{rank()}.json"] = json.dumps(rng_state()).encode()
    if is_main():
        files[step_dir / "run.json"] = json.dumps(effective, indent=1).encode()
        files[step_dir / "tokenizer.model"] = tokenizer.model_bytes

    def write_and_commit(files: dict[Path, Any]) -> None:
        group = writer.group
        on_every_rank(lambda: write_files(step_dir, files), group)
        manifests = gather_objects(on_every_rank(lambda: write_manifest(step_dir, rank()), group), group)
        on_every_rank(lambda: _commit(step_dir, state, mixture, identity, manifests), group)
        rotate(out_dir, step_dir, state, keep, group)

    writer.start(files, write_and_commit)


def _make_room(step_dir: Path) -> None:
    if is_main():
        with disk_errors(step_dir):
            if step_dir.exists():  # of an attempt that died while it saved
                remove(step_dir)
            step_dir.mkdir(parents=True)


def _commit(step_dir: Path, state: TrainState, mixture: Mixture, identity: Identity, manifests: list[str]) -> None:
    if is_main():
        with disk_errors(step_dir):
            write_commit(step_dir, state, mixture, identity, manifests)
        try:
            update_latest_and_best(step_dir.parent.parent, step_dir, state)
        except OSError as error:
            raise UserError(
                f"{step_dir} is saved, but no hint to it: {error}; mend that, and it is gone on from"
            ) from error


def archive_run(out_dir: Path) -> None:
    """Rename an old run's folder, so that a fresh one can begin under its name. Collective; raises UserError."""

    def rename() -> None:
        is_run = (out_dir / "run.json").is_file() or folder(out_dir).is_dir()
        if not (is_main() and is_run):
            return
        free = (out_dir.with_name(f"{out_dir.name}.old{n}") for n in count(1))
        aside = next(path for path in free if not path.exists())
        try:
            out_dir.rename(aside)
        except OSError as error:
            raise UserError(f"--fresh cannot rename {out_dir}: {error}; give another megagpt.out_dir") from error
        print_rank0(f"the old run is now {aside}")

    on_every_rank(rename)
