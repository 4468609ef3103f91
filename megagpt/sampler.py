"""Which tokens make global sample g: arithmetic alone, no tables, the same on any number of ranks.

A sample is a window of seq_len + 1 tokens of one dataset's token stream. Three keyed steps lead from the global
sample number g to it, each computable for any g at once:

    1. dataset   samples come in periods of 65,536, over which a shuffled pattern deals the datasets out in the exact
                 proportion of their weights
    2. epoch     the c-th sample of dataset k lies in its epoch c // n_windows
    3. window    a permutation of the epoch's windows, and a phase that shifts them all, so that no epoch cuts the
                 stream at the same places

The permutation is a balanced Feistel network on the smallest even number of bits that holds the range (Luby and
Rackoff 1988), with cycle walking for ranges that are not a power of four (Black and Rogaway 2002).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagpt.errors import UserError

PERIOD = 1 << 16
ROUNDS = 8
_64_BITS = (1 << 64) - 1
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Windows:
    """One row per sample: which dataset, its epoch there, and the first token of its seq_len + 1."""

    dataset: NDArray[np.int64]
    epoch: NDArray[np.int64]
    start: NDArray[np.int64]


@dataclass(frozen=True)
class Sampler:
    """Draws from datasets of n_tokens[k] tokens with weights[k], windows of seq_len + 1 tokens."""

    n_tokens: tuple[int, ...]
    weights: tuple[float, ...]
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        """Raises UserError for a dataset that is too short, or a weight too small to be dealt out."""
        for k, n in enumerate(self.n_tokens):
            if n < 2 * self.seq_len + 1:
                raise UserError(
                    f"training dataset {k} has {n} tokens, too few for model.seq_len={self.seq_len}, which needs "
                    f"{2 * self.seq_len + 1}; lower seq_len to {max(1, (n - 1) // 2)} or build more data"
                )
        if 0 in self.shares:
            k = self.shares.index(0)
            raise UserError(
                f"training dataset {k} has weight {self.weights[k]} of {sum(self.weights)}: less than one sample "
                f"in {PERIOD}; raise its weight or leave it out"
            )

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Samples of each dataset in a period: the weights rounded by largest remainder."""
        exact = [w / sum(self.weights) * PERIOD for w in self.weights]
        shares = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
        for k in by_remainder[: PERIOD - sum(shares)]:
            shares[k] += 1
        return tuple(shares)

    def n_windows(self, k: int) -> int:
        """Windows per epoch: one fewer than fit, so that every phase has room."""
        return (self.n_tokens[k] - 1) // self.seq_len - 1

    def draw(self, first: int, count: int) -> Windows:
        """Samples first, first + 1, ..., first + count - 1."""
        dataset, drawn = self._deal(np.arange(first, first + count, dtype=np.int64))
        epoch, start = np.empty_like(drawn), np.empty_like(drawn)
        for k in np.unique(dataset).tolist():
            mine = dataset == k
            epoch[mine], i = np.divmod(drawn[mine], self.n_windows(k))
            start[mine] = self._starts(k, epoch[mine], i)
        return Windows(dataset, epoch, start)

    def _deal(self, g: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each g: the dataset, and how many samples of that dataset came before it."""
        period, place = np.divmod(g, PERIOD)
        dataset, before = (column[place] for column in self._pattern)
        return dataset, period * np.asarray(self.shares)[dataset] + before

    @cached_property
    def _pattern(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each place of a period: its dataset, and how many places of that dataset come before it."""
        shuffled = permute(np.arange(PERIOD), PERIOD, _key(self.seed, 0))
        dataset = np.searchsorted(np.cumsum(self.shares), shuffled, side="right")
        before = np.empty_like(dataset)
        for k, share in enumerate(self.shares):
            before[dataset == k] = np.arange(share)
        return dataset, before

    def _starts(self, k: int, epoch: NDArray[np.int64], i: NDArray[np.int64]) -> NDArray[np.int64]:
        starts = np.empty_like(i)
        for e in np.unique(epoch).tolist():
            mine = epoch == e
            window = permute(i[mine], self.n_windows(k), _key(self.seed, 1, k, e))
            round_, turn = divmod(e, self.seq_len)  # seq_len epochs go through all phases before one comes again
            [phase] = permute(np.array([turn]), self.seq_len, _key(self.seed, 2, k, round_))
            starts[mine] = phase + window * self.seq_len
        return starts


def permute(values: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """A keyed permutation of range(n), applied to each value."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [_key(key, r) for r in range(ROUNDS)]
    out = _feistel(values.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # walk the cycle until it comes back into the range
        out[outside] = _feistel(out[outside], half, round_keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(x: U64, half: int, round_keys: list[int]) -> U64:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left: U64 = x >> bits
    right: U64 = x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << bits) | right


def _key(*parts: int) -> int:
    """One 64-bit key from several numbers."""
    key = 0
    for part in parts:
        key = int(_mix(((key ^ part) + 0x9E3779B97F4A7C15) & _64_BITS) & _64_BITS)
    return key


def _mix(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on an int or an array: every bit reaches every bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64_BITS
    return x ^ (x >> 31)
