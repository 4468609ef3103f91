"""Compare the weights that all ranks hold, bit for bit."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megagpt.distributed.collectives import gather_over_ranks
from megagpt.distributed.process_group import world_size
from megagpt.errors import UserError


def compare_weights(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raises UserError, on every rank, if a parameter that all ranks hold has other bits on one of them. Collective.

    Under ZeRO-3 those are the small parameters that DeepSpeed keeps whole; of the others each rank has its own part.
    """
    whole = [(name, p.detach()) for name, p in named if p.numel() > 0]
    if world_size() == 1 or not whole:
        return
    sums = gather_over_ranks(torch.stack([_sum_of_bits(p) for _, p in whole])).cpu()  # (world_size, parameters)
    usual = sums.mode(dim=0).values
    differ = (sums != usual).any(dim=0).nonzero().flatten().tolist()
    if differ:
        ranks = sorted({r for n in differ for r in (sums[:, n] != usual[n]).nonzero().flatten().tolist()})
        one_of_two = "one of the two is wrong, which is unknown" if world_size() == 2 else f"wrong on rank {ranks}"
        raise UserError(
            f"after step {step} the ranks no longer have the same weights: {whole[differ[0]][0]}"
            + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
            + f" ({one_of_two}); a bit flipped in memory, or a computation went wrong. Nothing was saved over the last "
            "checkpoint: take that machine out and start again, the run goes on from there"
        )


def _sum_of_bits(p: Tensor) -> Tensor:
    """int64 (): modulo 2^64, so that any one bit that flips changes it."""
    return p.view(torch.int32 if p.element_size() == 4 else torch.int16).sum(dtype=torch.int64)
