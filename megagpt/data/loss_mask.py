"""The loss mask: how a row of tokens records which of them are targets, and how inputs and targets are made of it.

A row holds seq_len + 1 tokens: its first seq_len are inputs, its last seq_len their targets. A token that is an input
but not a target is *marked*: its row holds its bitwise complement, which is negative. One array so holds the tokens and
the mask, and a mark moves with its token when an augmentation moves it.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # a target without a loss; torch's own default
Row = NDArray[np.int64]

Fill = Callable[[int, Row], None]
"""fill(first, rows) writes samples first, first + 1, ... into the rows of a (B, T + 1) array."""

BatchTransform = Callable[[int, Row, Row], None]
"""transform(first, rows, targets) turns rows[:, :-1] into inputs, in place, and writes their targets (B, T)."""


class Tokens(Protocol):
    """A stream of tokens; or of packed rows, in which one position is one row (packing.py)."""

    n_tokens: int

    def copy(self, start: int, out: Row) -> None:
        """Fill `out` with the tokens from position `start` on."""

    def open_all(self) -> None:
        """Open every shard now and check that it belongs to this build. Raises UserError."""


def marked(tokens: Row) -> Row:
    """Return the tokens, all of them marked."""
    return np.minimum(tokens, ~tokens)


def unmarked(tokens: Row) -> Row:
    """Return the tokens without their marks."""
    return np.maximum(tokens, ~tokens)


def split(rows: Row, targets: Row) -> None:
    """Remove the marks of rows (B, T + 1), in place, and write targets (B, T): the next tokens, IGNORE if marked."""
    targets[:] = rows[:, 1:]
    targets[targets < 0] = IGNORE
    np.maximum(rows, ~rows, out=rows)
