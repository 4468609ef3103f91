"""Text as overlapping runs of n words, each run a 64-bit number: what near-duplicates and test sets are found by.

Shapes: W words, N runs of n words (N = W - n + 1).
"""

import re
import unicodedata

import numpy as np
import xxhash

WORD = re.compile(r"\w+")
BETWEEN_BEYOND_ASCII = re.compile(r"[^\x00-\x7f\w]")  # the range first and no "+": three times as fast
BETWEEN = bytes(ord(" ") if code < 128 and not WORD.match(chr(code)) else code for code in range(256))
ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction: a multiplier whose bits look random


def word_hashes(text: str) -> np.ndarray:
    """(W,) uint64: the words, runs of \\w+ after NFC and case folding, hashed by XXH3.

    Python's Unicode tables and a published hash decide, so that all machines with one version of Python agree.
    """
    text = unicodedata.normalize("NFC", text).casefold()
    if not text.isascii():
        text = BETWEEN_BEYOND_ASCII.sub(" ", text)
    words = text.encode().translate(BETWEEN).split()  # what WORD.findall finds, three times as fast
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """(N,) uint64 from the hashes of W words; none if W < n.

    A polynomial in ODD, modulo 2^64. The words' hashes are random and ODD is odd, so other words, or the same in
    another order, give another number but for one chance in 2^50 (for n up to a thousand).
    """
    if len(words) < n:
        return np.empty(0, np.uint64)
    count = len(words) - n + 1
    mixed = words[:count].copy()
    for i in range(1, n):
        mixed *= ODD
        mixed += words[i : count + i]
    return mixed
