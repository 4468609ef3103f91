"""Compare the replicas of the weights over ranks, bit for bit: a flipped bit or a wrong computation on one of them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megagpt.distributed.collectives import gather_over_ranks
from megagpt.distributed.process_group import world_size
from megagpt.errors import UserError


def compare_weights(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise UserError, on every rank, if a parameter that all ranks hold differs on one of them. Collective.

    Under ZeRO-3 only the small parameters that DeepSpeed keeps whole are compared; the others are sharded.
    """
    whole = [(name, p.detach()) for name, p in named if p.numel() > 0]
    if world_size() == 1 or not whole:
        return
    sums = gather_over_ranks(torch.stack([_sum_of_bits(p) for _, p in whole])).cpu()  # (world_size, parameters)
    usual = sums.mode(dim=0).values
    differ = (sums != usual).any(dim=0).nonzero().flatten().tolist()
    if differ:
        ranks = sorted({r for n in differ for r in (sums[:, n] != usual[n]).nonzero().flatten().tolist()})
        which = "on one of the two ranks, unknown which" if world_size() == 2 else f"on rank {ranks}"
        raise UserError(
            f"weights differ between ranks after step {step}: {whole[differ[0]][0]}"
            + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
            + f" ({which}); a bit flipped in memory, or a computation went wrong. The last checkpoint is untouched: "
            "remove that machine from the hostfile and give the same command, which resumes from it"
        )


def _sum_of_bits(p: Tensor) -> Tensor:
    """int64 (): the sum of a parameter's bit patterns modulo 2^64, which any single flipped bit changes."""
    return p.view(torch.int32 if p.element_size() == 4 else torch.int16).sum(dtype=torch.int64)
