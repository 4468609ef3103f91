"""Rows of tokens on their way from the shards to the model, and how one of them stops being a target.

A row holds seq_len + 1 tokens: its first seq_len are inputs, its last seq_len their targets. A token that the model
may read but is not to predict is *marked*: it stands in its row as its bitwise complement, which is negative. So one
array says both, and a mark moves along when an augmentation moves its token.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # a target without a loss; torch's own default
Row = NDArray[np.int64]

Fill = Callable[[int, Row], None]
"""Fill(first, rows) writes samples first, first + 1, ... into the rows of a (B, T + 1) array."""

BatchTransform = Callable[[int, Row, Row], None]
"""Rework(first, rows, targets) makes inputs of rows[:, :-1], in place, and writes their targets (B, T)."""


class Tokens(Protocol):
    """A stream of tokens, or what stands for one."""

    n_tokens: int

    def copy(self, start: int, out: Row) -> None:
        """Fill `out` with the tokens from `start` on."""

    def open_all(self) -> None:
        """Open every shard now and check that it is this build's."""


def marked(tokens: Row) -> Row:
    """The same tokens, none of them a target."""
    return np.minimum(tokens, ~tokens)


def unmarked(tokens: Row) -> Row:
    """The same tokens without their marks."""
    return np.maximum(tokens, ~tokens)


def split(rows: Row, targets: Row) -> None:
    """rows (B, T + 1) become unmarked inputs; targets (B, T) get the next tokens, IGNORE for the marked ones."""
    targets[:] = rows[:, 1:]
    targets[targets < 0] = IGNORE
    np.maximum(rows, ~rows, out=rows)
