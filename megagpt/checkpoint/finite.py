"""Tell whether a step's numbers are finite: of the state that is about to be saved, and of the files of an older step.

A step that is not finite has nothing to resume from: every update after it is skipped, and the next start fails alike.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.commit import commit_on_record, committed, read_commit, step_folder
from megagpt.distributed.collectives import errors_on_every_rank, gather_objects
from megagpt.distributed.process_group import rank, world_size
from megagpt.engine.safe_pickle import load_checked, pickles_of
from megagpt.errors import UserError


def not_finite(state: Any) -> str | None:
    """Return the dotted name of a tensor in a nested state that is not finite; None if all are.

    Values whose squares overflow count as well: a gradient norm of such weights is infinite. One read of the device.
    """
    found = [(name, x) for name, x in _tensors(state) if x.is_floating_point() and x.numel()]
    if not found:
        return None
    norms = [torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)) for _, x in found]
    sound = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().tolist()
    return next((name for (name, _), fine in zip(found, sound, strict=True) if not fine), None)


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested dicts, lists and tuples by its dotted name."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping | list | tuple):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def refuse_not_finite(step_dir: Path, files: Mapping[Path, Any]) -> None:
    """Raise UserError if a tensor of the files that this rank is about to save is not finite."""
    for path, state in files.items():
        if name := not_finite(state):
            raise UserError(
                f"checkpoint {step_dir} was not saved: {name} of {path.name} is not finite. "
                + what_to_change(step_dir.parent.parent)
            )


def what_to_change(out_dir: Path, last_finite: int | None = None) -> str:
    """Return the advice after numbers that were not finite: what to change, and the step that the run resumes from.

    `last_finite`: no step after this one was finite.
    """
    lower = "Lower optimizer.params.lr or gradient_clipping, or raise megagpt.schedule.warmup_steps, and give the same "
    steps = committed(out_dir)
    if not steps and commit_on_record(out_dir) is None:
        return f"{lower}command: it starts at step 0, because nothing is saved yet"
    if not steps:
        return f"{lower}command with --fresh: no finite step is saved (the old run is renamed and kept)"
    advice = f"{lower}command: it resumes from {steps[-1]}"
    if last_finite is None or steps[-1] < step_folder(out_dir, last_finite):
        return advice
    older = f"delete that folder to resume from {steps[-2]}" if len(steps) > 1 else "give --fresh too"
    return f"{advice}. No step after that checkpoint was finite: if the next start fails alike, {older}"


def find_not_finite(step_dir: Path) -> str | None:
    """Return what is not finite in the files of a verified step, or None. Each rank reads a share of them. Collective.

    Files whose commit tells that they were checked when they were saved are not read again. Raises UserError, on every
    rank, for a file that safe_pickle.py refuses.
    """
    if read_commit(step_dir).finite:
        return None
    with errors_on_every_rank():
        found = not_finite_file(step_dir, rank(), every=world_size())
    return next(filter(None, gather_objects(found)), None)


def not_finite_file(step_dir: Path, first: int = 0, *, every: int = 1) -> str | None:
    """Return what is not finite in every `every`-th file of a step from the `first` on, or None."""
    for path in pickles_of(step_dir)[first::every]:
        if name := not_finite(load_checked(path, mmap=True)):
            return f"{path} is not finite: {name}"
    return None
