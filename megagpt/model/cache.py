"""Key-value caches: what attention needs of the positions so far, so that a step of generation computes one position.

Shapes: B texts, T new positions, S positions that there is room for, K heads of keys and values, D head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Appends the keys and values (B, K, T, D) of new positions in one layer; returns those of all positions so far.
Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KeyValueCaches:
    """The keys and values of B texts in every layer. Each text begins at position 0 and has a length of its own.

    `kept` (n_layer, 2, B, K, S, D) is allocated once, with zeros: attention gives what is behind a text's end a weight
    of zero, which hides any number except NaN.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self.lengths = [0] * kept.size(2)

    def row(self, i: int) -> "KeyValueCaches":
        """Return empty caches of text i alone, which share its memory."""
        return KeyValueCaches(self.kept[:, :, i : i + 1])

    def next(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the next T tokens, (T,) or (B, T), and the mask of keys that they may attend to.

        Texts of one length need no mask (None), since attention is causal.
        """
        self.begin, self.end = min(self.lengths), max(self.lengths) + T
        self.even = self.begin + T == self.end
        device = self.kept.device
        if self.even:
            return torch.arange(self.begin, self.end, device=device), None
        lengths = torch.tensor(self.lengths, device=device).unsqueeze(1)  # (B, 1)
        self.rows = torch.arange(len(self.lengths), device=device).unsqueeze(1)  # (B, 1)
        self.positions = lengths + torch.arange(T, device=device)  # (B, T)
        keys = torch.arange(self.end, device=device)
        return self.positions, (keys <= self.positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, end)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Do what Append promises, at the positions that `next` has returned."""
        return self._append(self.kept[layer, 0], k), self._append(self.kept[layer, 1], v)

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        if self.even:
            kept[:, :, self.begin : self.end] = new
        else:
            kept[self.rows, :, self.positions] = new.transpose(1, 2)  # (B, T, K, D)
        return kept[:, :, : self.end]

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has appended."""
        self.lengths = [length + T for length in self.lengths]
