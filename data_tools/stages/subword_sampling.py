"""Subword regularization: sample one of the many tokenizations of a text, by a key, the same in every process.

SentencePiece can sample too, but since 0.2.3 its generator has a different seed in every process. Here a text is cut
into words, each with the spaces before it, and the tokenization of each word is sampled independently:

    unigram   among its CANDIDATES best, with probability proportional to p^alpha (Kudo 2018, section 3.3)
    bpe       among CANDIDATES results of BPE in which each merge is dropped with probability alpha (BPE-dropout,
              Provilkov et al. 2020, section 3)
"""

import heapq
import math
import re
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from data_tools.stages.select import keyed_hash
from megagpt.tokenizer.sentencepiece_model import META_SPACE
from megagpt.tokenizer.tokenizer import Tokenizer

CANDIDATES = 16
WORD = re.compile(r"[\n\t]| *[^ \n\t]{1,48}| +")  # longer words are cut
CACHED_WORDS = 500_000


class SubwordSampler:
    """Samples tokenizations of a tokenizer that encodes each word as it does in a text (`is_exact_in_parts`)."""

    def __init__(self, tokenizer: Tokenizer, alpha: float, seed: int) -> None:
        self._tokenizer, self._alpha, self._seed = tokenizer, alpha, seed
        self._candidates = _UnigramCandidates if tokenizer.kind == "unigram" else _BpeCandidates
        self._draw = self._candidates(tokenizer, alpha, seed)
        self._words: dict[str, tuple[list[float], list[Sequence[int]]]] = {}  # word -> cumulative probabilities, ids

    def encode(self, text: str, key: bytes) -> np.ndarray:
        """Ids (int32) that decode to the text. Equal keys and texts give equal ids."""
        words = WORD.findall(text)
        generator = np.random.Generator(np.random.Philox(key=keyed_hash(key, self._seed)))
        chosen = [self._choose(word, at) for word, at in zip(words, generator.random(len(words)).tolist(), strict=True)]
        return np.fromiter(chain.from_iterable(chosen), np.int32)

    def _choose(self, word: str, at: float) -> Sequence[int]:
        found = self._words.get(word)
        if found is None:
            if len(self._words) >= CACHED_WORDS:
                self._words.clear()
            weights, ids = self._draw(word)
            total = sum(weights)
            found = self._words[word] = [share / total for share in accumulate(weights)], ids
        shares, ids = found
        return ids[min(bisect(shares, at), len(ids) - 1)]


class _UnigramCandidates:
    def __init__(self, tokenizer: Tokenizer, alpha: float, seed: int) -> None:
        self._tokenizer, self._alpha = tokenizer, alpha

    def __call__(self, word: str) -> tuple[list[float], list[Sequence[int]]]:
        """Return (weights, ids) of the word's best tokenizations."""
        found = self._tokenizer.best(word, CANDIDATES)
        highest = found[0][0]
        return [math.exp(self._alpha * (score - highest)) for score, _ in found], [ids for _, ids in found]


class _BpeCandidates:
    def __init__(self, tokenizer: Tokenizer, alpha: float, seed: int) -> None:
        self._tokenizer, self._alpha, self._seed = tokenizer, alpha, seed
        self._pieces = tokenizer.pieces()  # piece -> (id, score)

    def __call__(self, word: str) -> tuple[list[float], list[Sequence[int]]]:
        """Return (weights, ids) of tokenizations of the word with dropped merges."""
        generator = np.random.Generator(np.random.Philox(key=keyed_hash(word.encode(), self._seed)))
        outcomes = [self._merge(word, generator) for _ in range(CANDIDATES if len(word) > 1 else 1)]
        return [1.0] * len(outcomes), outcomes

    def _merge(self, word: str, generator: np.random.Generator) -> Sequence[int]:
        """BPE with dropout: merge the best pair of neighbors first, each with probability 1 - alpha.

        The symbols are a doubly linked list (`before`, `after`); a merged one keeps the place of its left half.
        """
        symbols: list[str | None] = list(word.replace(" ", META_SPACE))
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, str]] = []  # best score first, then leftmost

        def propose(left: int) -> None:
            if left >= 0 and after[left] >= 0:
                merged = f"{symbols[left]}{symbols[after[left]]}"
                if merged in self._pieces:
                    heapq.heappush(heap, (-self._pieces[merged][1], left, merged))

        for left in range(len(symbols) - 1):
            propose(left)
        # more numbers than merges are ever proposed; if they run out, nothing more is dropped
        dropped = iter(generator.random(len(symbols) * 8).tolist())
        while heap:
            _, left, merged = heapq.heappop(heap)
            right = after[left]
            if symbols[left] is None or right < 0 or f"{symbols[left]}{symbols[right]}" != merged:
                continue  # one of the halves was merged with another symbol in the meantime
            if next(dropped, 1.0) < self._alpha:
                continue
            symbols[left], symbols[right] = merged, None
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            propose(before[left])
            propose(left)
        return [i for symbol in symbols if symbol is not None for i in self._ids_of(symbol)]

    def _ids_of(self, symbol: str) -> Sequence[int]:
        return [self._pieces[symbol][0]] if symbol in self._pieces else self._tokenizer.encode_bytes(symbol)
