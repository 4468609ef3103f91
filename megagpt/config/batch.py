"""Divide the global batch: micro-batch x gradient accumulation x data-parallel ranks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.doubling import halved
from megagpt.config.schedule import ScheduleConfig
from megagpt.errors import UserError
from megagpt.terminal import counted


@dataclass(frozen=True)
class BatchPlan:
    """global_batch = micro_batch x accumulation x replicas, all in sequences."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int
    sequence_parallel_size: int = 1

    @property
    def replicas(self) -> int:
        """Number of data-parallel ranks; with sequence parallelism, of groups of ranks that share samples."""
        return self.world_size // self.sequence_parallel_size


def batch_plan(ds: DeepSpeedConfig, world_size: int, ways: Iterable[tuple[int, str]] | None = None) -> BatchPlan:
    """Compute gradient accumulation from the global batch, which is the same on any number of ranks.

    Raises UserError, with the numbers to set, when the sizes do not multiply out. `ways` are numbers of ranks and how
    the user gets them; the first that the batch fits ends the message.
    """
    total, micro, accum = ds.train_batch_size, ds.train_micro_batch_size_per_gpu, ds.gradient_accumulation_steps
    shared_by = ds.sequence_parallel_size
    if world_size % shared_by:
        raise UserError(
            f"sequence_parallel_size={shared_by} does not divide the number of ranks, {world_size}; set "
            f"sequence_parallel_size to {math.gcd(shared_by, world_size)}"
            f"{_other_ranks(ds, ways) or f', or start a multiple of {shared_by} ranks'}"
        )
    _secondary_partition_divides(ds, world_size)
    replicas = world_size // shared_by
    per_pass = micro * replicas
    ranks = f"{replicas} {'rank' if shared_by == 1 else 'group'}{'s' if replicas > 1 else ''}"
    if shared_by > 1:
        ranks += f" of {shared_by} ranks (sequence_parallel_size)"
    other_ranks = _other_ranks(ds, ways or rank_numbers(world_size, "start {} rank{s}"))
    if accum is not None and accum * per_pass != total:
        left_out = f"set gradient_accumulation_steps to {total // per_pass}, or leave it out"
        raise UserError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accum} x {ranks} = {accum * per_pass}; "
            f"{f'set train_batch_size to {accum * per_pass}' if total % per_pass else left_out}{other_ranks}"
        )
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise UserError(
            f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} "
            f"= {per_pass}; set train_batch_size to {nearest}{_smaller_micro_batch(ds, replicas)}{other_ranks}"
        )
    return BatchPlan(total, micro, total // per_pass, world_size, shared_by)


def check_first_batch(schedule: ScheduleConfig, batch: BatchPlan, step: int = 0) -> None:
    """Raise UserError if the batch of a ramp after `step`, its smallest from there on, is no whole number of passes."""
    smallest, per_pass = schedule.batches(batch.global_batch).at(step), batch.micro_batch * batch.replicas
    if smallest % per_pass:
        fits = next(n for n in reversed(halved(batch.global_batch)) if n % per_pass == 0)
        way_out = f"set megagpt.schedule.first_batch to {fits}"
        if fits == batch.global_batch:
            way_out = "remove megagpt.schedule.first_batch and megagpt.schedule.batch_ramp_steps"
        share, rest = divmod(smallest, batch.replicas)
        if not rest:
            way_out += f", or set train_micro_batch_size_per_gpu to {math.gcd(share, batch.micro_batch)}"
        unit = "rank" if batch.sequence_parallel_size == 1 else "group"
        raise UserError(
            f"megagpt.schedule.first_batch={schedule.first_batch} makes a batch of {smallest} in step {step + 1}, "
            f"which is not a multiple of train_micro_batch_size_per_gpu={batch.micro_batch} x "
            f"{counted(batch.replicas, unit)} = {per_pass}; {way_out}"
        )


def _secondary_partition_divides(ds: DeepSpeedConfig, world_size: int) -> None:
    """Raise UserError where groups of hpZ do not divide the ranks: DeepSpeed makes groups of consecutive ranks."""
    size, key = ds.zero_optimization.secondary_ranks(world_size), "zero_optimization.zero_hpz_partition_size"
    if world_size % size:
        raise UserError(
            f"{key}={size} does not divide the number of ranks, {world_size}; set {key} to "
            f"{math.gcd(size, world_size)}, or start a multiple of {size} ranks"
        )


def rank_numbers(most: int, way: str) -> Iterator[tuple[int, str]]:
    """Yield each number of ranks from `most` down to one, with the way to get it.

    In the way, `{}` is the number, and `{s}` the end of a plural.
    """
    return ((n, way.format(n, s="" if n == 1 else "s")) for n in range(most, 0, -1))


def _other_ranks(ds: DeepSpeedConfig, ways: Iterable[tuple[int, str]] | None) -> str:
    way_out = next((way for n, way in ways or () if _fits(ds, n)), None)
    return f", or {way_out}" if way_out else ""


def _fits(ds: DeepSpeedConfig, ranks: int) -> bool:
    replicas, rest = divmod(ranks, ds.sequence_parallel_size)
    if rest or not replicas:
        return False
    accumulation, rest = divmod(ds.train_batch_size, ds.train_micro_batch_size_per_gpu * replicas)
    return not rest and accumulation > 0 and ds.gradient_accumulation_steps in (None, accumulation)


def _smaller_micro_batch(ds: DeepSpeedConfig, replicas: int) -> str:
    share, rest = divmod(ds.train_batch_size, replicas)
    if rest:
        return ""
    fitting = next(n for n in range(min(ds.train_micro_batch_size_per_gpu, share), 0, -1) if share % n == 0)
    return f", or train_micro_batch_size_per_gpu to {fitting}"
