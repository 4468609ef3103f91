"""A keyed permutation of range(n) by arithmetic alone: no table, any value at once.

A balanced Feistel network on the smallest even number of bits that holds the range (Luby and Rackoff 1988), with cycle
walking for ranges that are not a power of four (Black and Rogaway 2002).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_64_BITS = (1 << 64) - 1
U64 = NDArray[np.uint64]


def permute(values: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """A keyed permutation of range(n), applied to each value."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [key_of(key, r) for r in range(ROUNDS)]
    out = _feistel(values.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # walk the cycle until it comes back into the range
        out[outside] = _feistel(out[outside], half, round_keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def key_of(*parts: int) -> int:
    """One 64-bit key from several numbers."""
    key = 0
    for part in parts:
        key = int(_mix(((key ^ part) + 0x9E3779B97F4A7C15) & _64_BITS) & _64_BITS)
    return key


def _feistel(x: U64, half: int, round_keys: list[int]) -> U64:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left: U64 = x >> bits
    right: U64 = x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << bits) | right


def _mix(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on an int or an array: every bit reaches every bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64_BITS
    return x ^ (x >> 31)
