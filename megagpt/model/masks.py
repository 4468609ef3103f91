"""Masks of attention, true where a query may attend: positions of its own document.

Shapes: B batch, T positions.
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
