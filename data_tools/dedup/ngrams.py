"""Hash the n-grams of a text's words, by which near-duplicates and test sets are found.

Shapes: W words, N n-grams (N = W - n + 1).
"""

import re
import unicodedata

import numpy as np
import xxhash

WORD = re.compile(r"\w+")
# what separates words: beyond ASCII by a pattern (the range first and no "+": three times as fast), in ASCII by a table
BETWEEN_BEYOND_ASCII = re.compile(r"[^\x00-\x7f\w]")
BETWEEN = bytes(ord(" ") if code < 128 and not WORD.match(chr(code)) else code for code in range(256))
ODD = np.uint64(0x9E3779B97F4A7C15)  # the fraction of the golden ratio: a multiplier whose bits look random


def word_hashes(text: str) -> np.ndarray:
    """Return the XXH3 hashes of a text's words: matches of \\w+ after NFC and case folding. (W,) uint64.

    Equal on all machines with one version of Python, because only its Unicode tables and a published hash decide.
    """
    text = unicodedata.normalize("NFC", text).casefold()
    if not text.isascii():
        text = BETWEEN_BEYOND_ASCII.sub(" ", text)
    # what WORD.findall finds, three times as fast
    words = text.encode().translate(BETWEEN).split()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Return the hashes of all n-grams, from those of the W words. (N,) uint64; empty if W < n.

    Each is a polynomial in ODD modulo 2^64, with the words' hashes as coefficients. These are random and ODD is odd, so
    two n-grams with different words, or the same in another order, collide with a probability of about 2^-50 (n up to a
    thousand).
    """
    if len(words) < n:
        return np.empty(0, np.uint64)
    count = len(words) - n + 1
    mixed = words[:count].copy()
    for i in range(1, n):
        mixed *= ODD
        mixed += words[i : count + i]
    return mixed
