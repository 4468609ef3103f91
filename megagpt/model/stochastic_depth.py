"""Stochastic depth (Huang et al. 2016): in training, each sample skips each block with a probability of that block's.

Every rank computes every block, as the collectives of ZeRO-3 and sequence parallelism need, and a sample that skips a
block keeps what went into it. All is drawn before the first block, so recomputing a block draws nothing again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StochasticDepth:
    """Draws which samples skip which blocks. `same` makes the numbers of ranks that share samples those of one rank."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates
        self.same: Callable[[Tensor], Tensor] = lambda numbers: numbers

    def draw(self, batch: int, device: torch.device) -> Tensor | None:
        """Return booleans (n_layer, B, 1, 1), false where a sample skips a block; None if none ever does."""
        if not any(self.rates):
            return None
        numbers = self.same(torch.rand(len(self.rates), batch, device=device))
        return (numbers >= numbers.new_tensor(self.rates).unsqueeze(1)).view(*numbers.shape, 1, 1)

    def after(self, i: int, x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
        """Return y (B, T, C), what block i made of x, or x for the samples that skip it.

        What the block added is scaled, so that its mean is that of evaluation, where no block is skipped. The block
        gets a view of x, which has a node of its own in the graph: else gradients would be summed in another order
        where DeepSpeed recomputes the block.
        """
        return y if kept is None else torch.where(kept[i], x + (y - x) / (1.0 - self.rates[i]), x)
