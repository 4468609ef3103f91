"""Retention: which committed steps stay, and how the others are removed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from megagpt.atomic_files import fsync
from megagpt.checkpoint.commit import COMMIT, best, by_loss, committed, folder, step_folder, update_latest_and_best
from megagpt.checkpoint.verification import damaged_of_newest
from megagpt.config.schema import KeepConfig
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import Group, is_main, print_rank0
from megagpt.errors import writing_to
from megagpt.train_state import TrainState


def rotate(out_dir: Path, newest: Path, state: TrainState, keep: KeepConfig, group: Group) -> None:
    """Delete the steps that `keep` no longer names, now that a newer one is committed. Collective.

    The two newest undamaged steps are verified first, on all ranks; damaged newer ones are quarantined.
    """
    excess = False
    if is_main():
        with _reporting_disk_errors():
            excess = bool(steps_to_delete(out_dir, keep))
    damaged = damaged_of_newest(out_dir, group) if gather_objects(excess, group)[0] else []
    if is_main():
        with _reporting_disk_errors():
            if damaged:
                quarantine_steps(damaged)
                update_latest_and_best(out_dir, newest, state)
            prune(out_dir, keep)
    gather_objects(None, group)


@contextmanager
def _reporting_disk_errors() -> Iterator[None]:
    """Report a failed deletion instead of raising it: the newer checkpoint is already committed."""
    try:
        yield
    except OSError as error:
        print_rank0(f"an older checkpoint could not be deleted ({error}); training continues: delete it by hand")


def steps_to_delete(out_dir: Path, keep: KeepConfig) -> list[Path]:
    """Return the committed steps that neither `keep` nor the `best` pointer names, oldest first."""
    steps, named = committed(out_dir), best(out_dir)
    ranked = [named, *(path for path in by_loss(steps) if path != named)] if named else by_loss(steps)
    stay = {*steps[-keep.last :], *ranked[: keep.best]}
    if keep.every:
        stay |= {path for path in steps if int(path.name.removeprefix("step_")) % keep.every == 0}
    return [path for path in steps if path not in stay]


def prune(out_dir: Path, keep: KeepConfig) -> None:
    """Delete what `keep` does not name, and the remains of attempts that died while they saved or deleted."""
    for step_dir in steps_to_delete(out_dir, keep):
        remove(step_dir)
    for step_dir in folder(out_dir).glob("step_*"):
        if not (step_dir / COMMIT).is_file():
            remove(step_dir)


def quarantine_steps(damaged: list[Path]) -> None:
    """Rename damaged steps: their files stay for inspection, but they no longer count as checkpoints."""
    for step_dir in damaged:
        free = (step_dir.with_name(f"damaged{n}_{step_dir.name}") for n in count(1))
        step_dir.rename(next(path for path in free if not path.exists()))
        fsync(step_dir.parent)


def retract(out_dir: Path, step: int, state: TrainState) -> None:
    """Rename a step, if it is the newest that was saved, whose weights no later step could use. On rank 0.

    `latest` and `best` then name older steps; `state` is that of the run now.
    """
    step_dir = step_folder(out_dir, step)
    if committed(out_dir)[-1:] != [step_dir]:  # a later one was saved, so its weights were of use
        return
    print_rank0(f"checkpoint quarantined: no step after {step_dir} was finite")
    with writing_to(out_dir):
        quarantine_steps([step_dir])
    if steps := committed(out_dir):
        update_latest_and_best(out_dir, steps[-1], state)


def remove(step_dir: Path) -> None:
    """Delete a step, its COMMIT first: a half-deleted folder is no checkpoint."""
    (step_dir / COMMIT).unlink(missing_ok=True)
    fsync(step_dir)
    shutil.rmtree(step_dir)
