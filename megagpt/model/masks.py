"""Masks of attention, true where a query may attend: the positions of its document, or of a window.

Shapes: B batch, T positions, S positions of keys.
"""

import torch
from torch import Tensor


def document_positions(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions (B, T) that restart in each document, and the mask (B, 1, T, T) that keeps attention in it."""
    T = documents.size(1)
    place = torch.arange(T, device=documents.device)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0  # (B, T)
    first = torch.where(begins, place, 0).cummax(1).values  # (B, T): where the document of each position begins
    # Two comparisons make booleans at once: integers (B, T, T) would take 8 times the memory.
    seen = (place >= first.unsqueeze(-1)) & (place <= place.unsqueeze(1))  # (B, T, T)
    return place - first, seen.unsqueeze(1)


def window_mask(queries: Tensor, n_keys: int, window: int, visible: Tensor | None) -> Tensor | None:
    """Return the mask that keeps attention in the last `window` positions, a query's own included (Child et al. 2019).

    (1, 1, T, S) for queries at positions (T,), (B, 1, T, S) for queries (B, T) or with a mask `visible` (B, 1, T, S),
    which replaces the causal rule. Keys are at positions 0 to n_keys - 1. `visible`, if no query has more to attend to.
    """
    if window >= n_keys:
        return visible
    # Four dimensions: with three, torch would compute the scores without a fused kernel.
    last, key = queries.view(-1, 1, queries.size(-1), 1), torch.arange(n_keys, device=queries.device)
    return (key > last - window) & (key <= last if visible is None else visible)
