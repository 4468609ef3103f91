"""A keyed permutation of range(n) by arithmetic alone: no table, any value at once.

A balanced Feistel network on the smallest even number of bits that holds the range (Luby and Rackoff 1988), with cycle
walking for ranges that are not a power of four (Black and Rogaway 2002).
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_64_BITS = (1 << 64) - 1
_A, _B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64's finalizer (Steele, Lea and Flood 2014)
_SHIFTS = tuple(map(np.uint64, (30, 27, 31)))
_FACTORS = tuple(map(np.uint64, (_A, _B)))
U64 = NDArray[np.uint64]


def permute(values: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Apply the permutation of range(n) that `key` selects to each value; values must lie in range(n)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(key_of(key, r)) for r in range(ROUNDS)]
    out = _feistel(values.astype(np.uint64), half, round_keys)
    # The network permutes a range of up to 4 n values: follow its cycle from n or more until it is back below n.
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = walked = _feistel(out[outside], half, round_keys)
        outside = outside[walked >= n]
    return out.astype(np.int64)


def key_of(*parts: int) -> int:
    """Mix several numbers into one 64-bit key."""
    key = 0
    for part in parts:
        key = _mix(((key ^ part) + 0x9E3779B97F4A7C15) & _64_BITS)
    return key


def _feistel(x: U64, half: int, round_keys: list[np.uint64]) -> U64:
    """Permute numbers of 2 * half bits: each round replaces one half by itself XOR a keyed hash of the other."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left: U64 = x >> bits
    right: U64 = x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix_all(right ^ key) & mask)
    return (left << bits) | right


def _mix(x: int) -> int:
    """Hash 64 bits to 64: every input bit affects every output bit."""
    x = (x ^ (x >> 30)) * _A & _64_BITS
    x = (x ^ (x >> 27)) * _B & _64_BITS
    return x ^ (x >> 31)


def _mix_all(x: U64) -> U64:
    """Apply `_mix` to each element, in place; products of uint64 wrap around by themselves."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        x ^= x >> shift
        x *= factor
    x ^= x >> _SHIFTS[2]
    return x
