"""Divide the global batch: micro-batch x gradient accumulation x data-parallel ranks."""

import math
from dataclasses import dataclass

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.errors import UserError


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


def batch_plan(ds: DeepSpeedConfig, world_size: int) -> BatchPlan:
    """Compute gradient accumulation from the global batch, which is the same on any number of ranks.

    Raises UserError, with the number to set, when the sizes do not multiply out.
    """
    total, micro, accum = (
        ds.train_batch_size,
        ds.train_micro_batch_size_per_gpu,
        ds.gradient_accumulation_steps,
    )
    shared_by = ds.sequence_parallel_size
    if world_size % shared_by:
        raise UserError(
            f"sequence_parallel_size={shared_by} does not divide the number of ranks, {world_size}; "
            f"set it to {math.gcd(shared_by, world_size)}, or start a multiple of {shared_by} ranks"
        )
    replicas = world_size // shared_by
    per_pass = micro * replicas
    ranks = f"{replicas} {'rank' if shared_by == 1 else 'group'}{'s' if replicas > 1 else ''}"
    if shared_by > 1:
        ranks += f" of {shared_by} ranks (sequence_parallel_size)"
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise UserError(
            f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} "
            f"= {per_pass}; set train_batch_size to {nearest}, or another micro-batch"
        )
    if accum is not None and accum * per_pass != total:
        raise UserError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accum} x {ranks} = {accum * per_pass}; "
            f"set gradient_accumulation_steps to {total // per_pass}, or leave it out"
        )
    return BatchPlan(total, micro, total // per_pass, world_size, shared_by)
