"""Find parameters in the tensors that the optimizer updates: under ZeRO these are a rank's parts of flat tensors.

stage 0      each rank has everything. The optimizer updates the parameters one by one (in 16 bit fp32 copies of
             them, or one long tensor of each group's copies)
stage 1, 2   each group of parameters is one long tensor, cut evenly over the ranks, also inside parameters
stage 3      each parameter is cut evenly over the ranks; a rank's slices of a sub-group lie in one tensor
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megagpt.distributed.process_group import rank, world_size


@dataclass(frozen=True)
class ParamSlice:
    """`numel` values of a parameter from `start` on; they begin at `offset` in the tensor that is updated."""

    name: str
    start: int
    numel: int
    offset: int


def param_sizes(engine: Engine, groups: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return {name: number of values} of all parameters, in the order of the optimizer's groups."""
    return {engine.param_names[p]: getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"]}


def own_slices(engine: Engine, sizes: dict[str, int]) -> list[tuple[Tensor, list[ParamSlice]]]:
    """Return this rank's tensors, each with the slices in it. `sizes` is in the order of the optimizer's groups."""
    optimizer = engine.optimizer
    flats = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        slices = one_after_another(flats, sizes)
    elif stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
        names = [[engine.param_names[p] for p in group] for group in optimizer.fp16_groups]
        slices = [cut({name: sizes[name] for name in group}, rank(), world_size()) for group in names]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # Its `_hp_mapping` is wrong with round_robin_gradients on several ranks, which change the order.
        slices = [
            in_partition([(engine.param_names[p], p.numel()) for p in group], at, rank() * flat.numel(), flat.numel())
            for flat, group, at in zip(
                flats, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
        ]
    else:  # DeepSpeed's BF16_Optimizer
        slices = [[] for _ in flats]
        for p, name in engine.param_names.items():
            if (link := p._hp_mapping) is not None:
                of_parameter, of_flat = link.lp_fragment_address, link.hp_fragment_address
                at = ParamSlice(name, of_parameter.start, of_parameter.numel, of_flat.start)
                slices[link.param_group_index].append(at)
    return list(zip(flats, slices, strict=True))


def one_after_another(flats: Sequence[Tensor], sizes: dict[str, int]) -> list[list[ParamSlice]]:
    """Return whole parameters in their order, as many in each tensor as fill it."""
    found: list[list[ParamSlice]] = []
    names = iter(sizes)
    for flat in flats:
        found.append([])
        offset = 0
        while offset < flat.numel():
            name = next(names)
            found[-1].append(ParamSlice(name, 0, sizes[name], offset))
            offset += sizes[name]
    return found


def in_partition(params: list[tuple[str, int]], offsets: list[int], begin: int, length: int) -> list[ParamSlice]:
    """Return what a rank's partition, `length` values from `begin` on, holds of the parameters of a flat group.

    They are names with sizes, and begin at `offsets` in the group.
    """
    found = []
    for (name, size), offset in zip(params, offsets, strict=True):
        start, end = max(offset, begin), min(offset + size, begin + length)
        if start < end:
            found.append(ParamSlice(name, start - offset, end - start, start - begin))
    return found


def cut(sizes: dict[str, int], r: int, n_ranks: int) -> list[ParamSlice]:
    """Return rank r's slice of each parameter at stage 3; the last slices are padded to the length of the others."""
    found, offset = [], 0
    for name, size in sizes.items():
        length = -(-size // n_ranks)
        found.append(ParamSlice(name, r * length, max(0, min(length, size - r * length)), offset))
        offset += length
    return found


def refresh_weights(engine: Engine, own: Sequence[tuple[Tensor, list[ParamSlice]]]) -> None:
    """Copy what the optimizer updates, which something else has changed, into the weights to compute with. Collective.

    `own`: what `own_slices` returned.
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
        return
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # leaves no parameter gathered
    parameters = {name: p for p, name in engine.param_names.items()}
    for flat, slices in own:
        for piece in slices:
            p = parameters[piece.name]
            computed_with = p.ds_tensor if stage == 3 else p
            here = flat.data.view(-1).narrow(0, piece.offset, piece.numel)
            computed_with.data.view(-1).narrow(0, 0, piece.numel).copy_(here)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def clear_padding(engine: Engine, sizes: dict[str, int]) -> None:
    """Write zeros between the slices of a rank's flat tensors, where DeepSpeed leaves what was in memory at stage 3.

    It is in no weight, but in the files of checkpoints, which are not committed if it is not finite.
    """
    for flat, slices in own_slices(engine, sizes) if engine.zero_optimization_stage() == 3 else ():
        if flat.numel():  # else it is on NVMe
            ends = [0, *(piece.offset + piece.numel for piece in slices)]
            begins = [*(piece.offset for piece in slices), flat.numel()]
            for end, begin in zip(ends, begins, strict=True):
                flat.data[end:begin] = 0.0
