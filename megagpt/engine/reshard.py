"""Resharding: load a checkpoint on other ranks, or with another ZeRO stage, dtype or offload.

Each rank maps the files of all old ranks into memory and copies the slices of each parameter that it holds now: weights
and the optimizer's moments. Nothing is written, so no conversion can be left half done, and memory holds one slice at a
time. DeepSpeed's universal checkpoints need a second copy of everything on the disk, and do not support stage 0.

flat_tensors.py knows where a rank's tensors hold the parameters, this file where the saved ones do. All tensors are
flat fp32 views.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.process_group import progress_bar, rank, world_size
from megagpt.engine.build import Engine
from megagpt.engine.ema import EMA
from megagpt.engine.flat_tensors import (
    ParamSlice,
    cut,
    in_partition,
    one_after_another,
    own_slices,
    param_sizes,
    refresh_weights,
)
from megagpt.engine.muon import Muon
from megagpt.engine.optimizer import decay_groups, has_own_rates
from megagpt.engine.safe_pickle import check_pickles, load_checked, pickles_of
from megagpt.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "weights"

REPAIR = "start the run as it was saved, or give another megagpt.out_dir for a new one"


@dataclass(frozen=True)
class SavedShape:
    """The layout of the run that saved a step."""

    world_size: int
    zero_stage: int
    dtype: str  # of the weights it computed with


@dataclass(frozen=True)
class FlatTensor:
    """One tensor that the optimizer updates on one rank, and the parameter slices in it."""

    values: Mapping[str, Tensor]  # weights, Adam's two moments or Muon's one, and perhaps an average: alike in length
    slices: list[ParamSlice]


def load_reshaped(
    engine: Engine,
    step_dir: Path,
    shape: SavedShape,
    *,
    weight_decay_on: Literal["matrices", "all"],
    step: int,
    samples_seen: int,
) -> None:
    """Load weights and moments of a step of any layout. Adam's settings stay; an fp16 loss scale restarts. Collective.

    Raises UserError, on every rank and before the model changes, for files that safe_pickle.py refuses, and for files
    that lack a slice of a parameter.
    """
    with errors_on_every_rank():
        check_pickles(pickles_of(step_dir)[rank() :: world_size()])
    momentum = 0.0 if isinstance(engine.basic_optimizer, Muon) else None
    scale: dict[str, float] | None = {} if has_own_rates(engine.basic_optimizer) else None
    groups = decay_groups(engine.module, 0.0, weight_decay_on, momentum=momentum, lr_scale=scale)
    sizes = param_sizes(engine, groups)
    with errors_on_every_rank():
        old, n_updates = saved_tensors(step_dir, shape, sizes)
    placed = own_slices(engine, sizes)
    own = _own_tensors(engine, placed, n_updates, averages=any(EMA in flat.values for flat in old))
    with errors_on_every_rank():
        copies = _copies(own, old, step_dir)
    with progress_bar("resharding", total=len(copies), unit="slice") as bar:
        for to, value in copies:
            to.copy_(value)
            bar.update()
    engine.global_steps, engine.global_samples = step, samples_seen
    refresh_weights(engine, placed)


def _copies(own: list[FlatTensor], old: list[FlatTensor], step_dir: Path) -> list[tuple[Tensor, Tensor]]:
    """Return (to, from) pairs of equal lengths for all that a rank holds. Raises UserError if some of it is missing."""
    lies_in = defaultdict(list)
    for source in old:
        for have in source.slices:
            lies_in[have.name].append((source, have))
    copies = []
    for flat, want in [(mine, piece) for mine in own for piece in mine.slices]:
        reached, end, missing = want.start, want.start + want.numel, 0
        for source, have in sorted(lies_in[want.name], key=lambda found: found[1].start):
            begin = max(reached, have.start)  # an overlap of two sources is taken once, so that it cannot hide a hole
            n = min(end, have.start + have.numel) - begin
            if n > 0 and flat.values.keys() == source.values.keys():  # else it lacks a moment
                to, at = want.offset + begin - want.start, have.offset + begin - have.start
                copies += [
                    (mine.narrow(0, to, n), source.values[name].narrow(0, at, n)) for name, mine in flat.values.items()
                ]
                missing += begin - reached
                reached = begin + n
        missing += end - reached
        if missing:
            raise UserError(f"checkpoint {step_dir} lacks {missing} values of {want.name}; {REPAIR}")
    return copies


# --- where this run holds its values ----------------------------------------------------------------------------


def _own_tensors(
    engine: Engine, placed: list[tuple[Tensor, list[ParamSlice]]], n_updates: int, *, averages: bool
) -> list[FlatTensor]:
    """Return this rank's tensors, with moments, and averages, allocated where the optimizer has none yet."""
    adam, own = engine.basic_optimizer, []
    for flat, inside in placed:
        state = adam.state[flat]
        is_torch = isinstance(adam, torch.optim.Adam)  # DeepSpeed's Adams count steps in plain numbers
        state["step"] = torch.tensor(float(n_updates), device=flat.device) if is_torch else n_updates
        by_muon = isinstance(adam, Muon) and flat in adam.matrices
        for moment in (*(MOMENTS[:1] if by_muon else MOMENTS), *([EMA] if averages else [])):
            if moment not in state:
                state[moment] = torch.zeros_like(flat.data)
        own.append(_flat_tensor(flat.data, state, inside))
    return own


def _flat_tensor(weights: Tensor, state: Mapping[str, Any], slices: list[ParamSlice]) -> FlatTensor:
    values = {WEIGHTS: weights} | {name: state[name] for name in (*MOMENTS, EMA) if name in state}
    return FlatTensor({name: x.view(-1) for name, x in values.items()}, slices)


# --- where the saved files hold them ----------------------------------------------------------------------------


def saved_tensors(step_dir: Path, shape: SavedShape, sizes: dict[str, int]) -> tuple[list[FlatTensor], int]:
    """Return all tensors of all old ranks, mapped into memory, and how many updates were made."""
    stage, n_ranks = shape.zero_stage, shape.world_size
    try:
        if stage == 0:
            weights, states = _of_stage_0(step_dir, shape.dtype, sizes)
            return _flat_tensors(weights, states, one_after_another(weights, sizes)), _step(states)
        found: list[FlatTensor] = []
        # The same for all ranks: the names of each group, as they lie behind each other.
        file = "mp_rank_00_model_states.pt" if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
        groups = [{name: sizes[name] for name in group} for group in _mapped(step_dir, file)["param_shapes"]]
        saved = [
            _mapped(step_dir, f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            for r in range(n_ranks)
        ]
        partitions = _partitions(saved, groups) if stage < 3 else []
        for r, state in enumerate(saved):
            if stage == 3:
                cuts = [cut(group, r, n_ranks) for group in groups]
                weights, states = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
            else:
                cuts = partitions[r]
                weights, states = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"]
            found += _flat_tensors(weights, states, cuts)
        return found, _step(states)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"checkpoint {step_dir} does not have the expected layout ({error!r}); {REPAIR}") from error


def saved_averages(step_dir: Path, shape: SavedShape, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the averaged weights of a step, flat, by name; none if it has none. `sizes` as for `own_slices`."""
    old, _ = saved_tensors(step_dir, shape, sizes)
    if not any(EMA in flat.values for flat in old):
        return {}
    found = {name: torch.empty(size) for name, size in sizes.items()}
    for flat in old:
        for piece in flat.slices:
            average = flat.values[EMA].narrow(0, piece.offset, piece.numel)
            found[piece.name].narrow(0, piece.start, piece.numel).copy_(average)
    return found


def _of_stage_0(step_dir: Path, dtype: str, sizes: dict[str, int]) -> tuple[list[Tensor], Any]:
    model = _mapped(step_dir, "mp_rank_00_model_states.pt")
    optimizer = model["optimizer"]
    if dtype == "fp32":
        return [model["module"][name] for name in sizes], optimizer["state"]
    if "fp32_groups_flat" in optimizer:  # with DeepSpeed's FusedAdam
        weights = optimizer["fp32_groups_flat"]
    else:
        weights = [weight for group in optimizer["fp32_groups"] for weight in group]
    return weights, optimizer["optimizer_state_dict"]["state"]


def _flat_tensors(weights: Sequence[Tensor], states: Any, slices: list[list[ParamSlice]]) -> list[FlatTensor]:
    """`states[i]` is the optimizer's state of the i-th tensor."""
    return [_flat_tensor(x.detach(), states[i], s) for i, (x, s) in enumerate(zip(weights, slices, strict=True))]


def _partitions(saved: list[Any], groups: list[dict[str, int]]) -> list[list[list[ParamSlice]]]:
    """Return each rank's slices of each group at stages 1 and 2.

    With round_robin_gradients on several ranks DeepSpeed saves addresses of another order than that in which the
    parameters lie, which `groups` have.
    """
    mappings = [state["param_slice_mappings"] for state in saved]
    in_order = [list(dict.fromkeys(name for of_rank in mappings for name in of_rank[i])) for i in range(len(groups))]
    lie = [list(group) for group in groups]
    reordered = in_order != lie and list(map(sorted, in_order)) == list(map(sorted, lie))
    if not reordered or any(map(any, saved[0].get("param_alignment_paddings", ()))):
        begun = {name: 0 for group in groups for name in group}
        return [[_continued(group, begun) for group in of_rank] for of_rank in mappings]
    found = []
    begins = [0] * len(groups)
    for state in saved:
        lengths = [flat.numel() for flat in state["single_partition_of_fp32_groups"]]
        pairs = zip(groups, begins, lengths, strict=True)
        found.append(
            [in_partition(list(g.items()), [*accumulate(g.values(), initial=0)][:-1], at, n) for g, at, n in pairs]
        )
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    return found


def _continued(group: Mapping[str, Any], begun: dict[str, int]) -> list[ParamSlice]:
    """Return a rank's slices of a group: each parameter continues where the previous rank's slice ended (`begun`)."""
    found = []
    for name, address in group.items():
        found.append(ParamSlice(name, begun[name], address.numel, address.start))
        begun[name] += address.numel
    return found


def _step(states: Any) -> int:
    return int(states[0]["step"])


def _mapped(step_dir: Path, pattern: str) -> Any:
    """Load a file whose tensors are read from disk only when they are used."""
    (path,) = step_dir.glob(pattern)
    return load_checked(path, mmap=True)
