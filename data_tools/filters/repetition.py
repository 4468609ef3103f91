"""Reject documents that repeat themselves: the rule of Gopher (Rae et al. 2021, arXiv 2112.11446), Table A1.

Where the paper leaves a choice, the rule does what datatrove does: one or more newlines end a line, two or more a
paragraph; n-grams are of words (`text_statistics.py`); shares of characters are of the whole text with its white space.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_tools.filters.text_statistics import TextStatistics
from data_tools.option_types import Limit
from megagpt.config.parsing import Strict

NgramLimits = tuple[tuple[Annotated[int, Field(ge=2, le=1000)], Limit], ...]


class GopherRepetitionConfig(Strict):
    """Limits of gopher_repetition."""

    max_duplicate_lines: Limit | None = Field(
        default=0.3, description="share of the lines that repeat an earlier one; null: any"
    )
    max_duplicate_paragraphs: Limit | None = Field(
        default=0.3, description="share of the paragraphs that repeat an earlier one; null: any"
    )
    max_duplicate_line_characters: Limit | None = Field(
        default=0.2, description="share of the characters in lines that repeat an earlier one; null: any"
    )
    max_duplicate_paragraph_characters: Limit | None = Field(
        default=0.2, description="share of the characters in paragraphs that repeat an earlier one; null: any"
    )
    max_top_ngrams: NgramLimits = Field(
        default=((2, 0.2), (3, 0.18), (4, 0.16)),
        description="(n, share of the characters in the n-gram that occurs most often); an empty list: any",
    )
    max_duplicate_ngrams: NgramLimits = Field(
        default=((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
        description="(n, share of the characters in n-grams that repeat an earlier one); an empty list: any",
    )


def gopher_repetition(stats: TextStatistics, cfg: GopherRepetitionConfig) -> str | None:
    """Return why the document is rejected, or None."""
    return _lines(stats.text, cfg) or _top_ngrams(stats, cfg) or _duplicate_ngrams(stats, cfg)


def _lines(text: str, cfg: GopherRepetitionConfig) -> str | None:
    total = max(len(text), 1)
    # the same as a split at \n\n+, many times as fast
    paragraphs = [part for part in [part.strip("\n") for part in text.strip().split("\n\n")] if part] or [""]
    repeated, characters = count_duplicates(paragraphs)
    if _above(repeated / len(paragraphs), cfg.max_duplicate_paragraphs):
        return "duplicate paragraphs"
    if _above(characters / total, cfg.max_duplicate_paragraph_characters):
        return "characters in duplicate paragraphs"
    lines = [line for line in text.split("\n") if line]
    # a split at \n+ would leave an empty line at an end with newlines
    lines += [""] * (text.startswith("\n") + text.endswith("\n"))
    repeated, characters = count_duplicates(lines)
    if _above(repeated / max(len(lines), 1), cfg.max_duplicate_lines):
        return "duplicate lines"
    if _above(characters / total, cfg.max_duplicate_line_characters):
        return "characters in duplicate lines"
    return None


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """Return (number, characters) of the parts that repeat an earlier one."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _top_ngrams(stats: TextStatistics, cfg: GopherRepetitionConfig) -> str | None:
    """Tell whether the characters of the most frequent n-gram, at all its occurrences, are above the limit."""
    # an upper bound on how often an n-gram occurs: a longer one occurs no more often than those within it
    most = len(stats.words)
    for n, limit in sorted(cfg.max_top_ngrams):
        allowed = limit * len(stats.text)
        sizes = stats.ngram_lengths(n) + (n - 1)  # with the spaces between the words
        if not len(sizes) or most * int(sizes.max()) <= allowed:
            continue
        keys = stats.ngrams(n)
        ordered = np.sort(keys)
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
        frequencies = starts[1:] - starts[:-1]
        most = int(frequencies.max())
        if most * int(sizes.max()) <= allowed:
            continue
        top = ordered[starts[:-1][frequencies == most]]
        # among those that are equally frequent, the first in the text counts
        first = int(_where_in(keys, top)[0])
        if most * int(sizes[first]) > allowed:
            return f"the most frequent {n}-gram"
    return None


def _duplicate_ngrams(stats: TextStatistics, cfg: GopherRepetitionConfig) -> str | None:
    """Tell whether the characters in n-grams that repeat an earlier one are above the limit, for any n.

    The exact count (_repeat_more) is slow. Two upper bounds, each cheaper, decide most documents before.
    """
    limits = sorted((n, limit * len(stats.text)) for n, limit in cfg.max_duplicate_ngrams)
    for i, (n, allowed) in enumerate(limits):
        keys, sizes = stats.ngrams(n), stats.ngram_lengths(n)
        ordered = np.sort(keys)
        repeats = ordered[1:][ordered[1:] == ordered[:-1]]
        least = min(allowed for _, allowed in limits[i:])
        # repeated n-grams of a larger n are made of those of this n and cover no more: no later limit is exceeded
        if not len(repeats) or len(repeats) * int(sizes.max()) <= least:
            return None
        positions = _where_in(keys, repeats)
        keys = keys[positions]
        bound = _covered_characters(positions, keys, stats.lengths, n)
        if bound <= least:
            return None
        if bound > allowed and _repeat_more(allowed, positions, keys, sizes[positions], n):
            return f"duplicate {n}-grams"
    return None


def _where_in(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the keys that are among `wanted`, which is sorted."""
    nearest = np.minimum(wanted.searchsorted(keys), len(wanted) - 1)
    return np.flatnonzero(wanted[nearest] == keys)


def _covered_characters(
    positions: NDArray[np.int64], keys: NDArray[np.int64], lengths: NDArray[np.int64], n: int
) -> int:
    """Characters of all words in n-grams that repeat an earlier one: an upper bound of what _repeat_more counts."""
    order = keys.argsort(kind="stable")
    repeats = positions[order[1:][keys[order[1:]] == keys[order[:-1]]]]
    # the number of repeated n-grams over each word, from the differences where they begin and end
    depth = np.zeros(len(lengths) + 1, np.int64)
    depth[repeats] += 1
    depth[repeats + n] -= 1
    return int(lengths[depth.cumsum()[:-1] > 0].sum())


def _repeat_more(
    allowed: float, positions: NDArray[np.int64], keys: NDArray[np.int64], sizes: NDArray[np.int64], n: int
) -> bool:
    """Tell whether n-grams that repeat an earlier one have more than `allowed` characters, counted without overlap.

    After a repeated n-gram, the search continues behind it. An n-gram that is skipped this way does not count as seen.
    `positions` are those of the n-grams that occur more than once; no other one can repeat or be repeated.
    """
    seen: set[int] = set()
    characters, next_position = 0, 0
    for position, key, size in zip(positions.tolist(), keys.tolist(), sizes.tolist(), strict=True):
        if position < next_position:
            continue
        if key in seen:
            characters += size
            next_position = position + n
            if characters > allowed:
                return True
        else:
            seen.add(key)
    return False
