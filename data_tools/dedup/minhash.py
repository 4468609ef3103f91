"""Summaries by which documents are compared for deduplication: a digest of the text, and a MinHash signature.

Both take a document piece by piece, like `hashlib`, in memory that does not grow with the document.
"""

import hashlib
import unicodedata

import numpy as np
import rensa
import xxhash

from data_tools.dedup.ngrams import ngram_hashes, word_hashes

DIGEST_BYTES = 16
WHITE_SPACE = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"  # where str.split() splits ASCII


class TextDigest:
    """128 bits of blake2b over the text in Unicode's NFC, without white space.

    Texts with equal digests are equal up to white space and canonical equivalence.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def update(self, text: str) -> None:
        if text.isascii():
            self._hash.update(text.encode().translate(None, delete=WHITE_SPACE))
        else:
            self._hash.update("".join(unicodedata.normalize("NFC", text).split()).encode())

    def digest(self) -> bytes:
        return self._hash.digest()


class MinHash:
    """MinHash signature: for each of n_hashes hash functions, its smallest value over the document's n-grams of words.

    The expected fraction of values in which two documents agree is the Jaccard similarity of their sets of n-grams
    (Broder, "On the resemblance and containment of documents", 1997). A document with fewer than `ngram` words is one
    n-gram of all its words. Pieces cut between words give the signature of the whole text.
    """

    def __init__(self, n_hashes: int, ngram: int, seed: int):
        self._ngram = ngram
        self._seed = seed
        self.values = np.full(n_hashes, 2**32 - 1, np.uint32)  # of the n-grams so far
        self._last = np.empty(0, np.uint64)  # the last ngram - 1 words, whose n-grams continue in the next piece
        self._n_words = 0

    def update(self, text: str) -> None:
        words = np.concatenate([self._last, word_hashes(text)])
        self._n_words += len(words) - len(self._last)
        self._include(ngram_hashes(words, self._ngram))
        self._last = words[max(0, len(words) - self._ngram + 1) :]

    def band_keys(self, n_bands: int) -> bytes:
        """n_bands keys of 16 bytes, each the XXH3 of one band of the values; no keys for a document without words."""
        if self._n_words == 0:
            return b""
        if self._n_words < self._ngram:
            self._include(ngram_hashes(self._last, self._n_words))
        values = self.values.astype("<u4").tobytes()
        size = len(values) // n_bands
        return b"".join([xxhash.xxh3_128_digest(values[i : i + size]) for i in range(0, len(values), size)])

    def _include(self, ngrams: np.ndarray) -> None:
        ends = [0, len(ngrams)]
        rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(ngrams, ends, len(self.values), self._seed)
        np.minimum(self.values, np.array(rows.to_rows()[0], np.uint32), out=self.values)
