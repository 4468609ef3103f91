"""The quality rules of Gopher, C4 and FineWeb, with the thresholds of the papers as defaults.

Where a paper leaves a choice, the rule does what datatrove 0.10.1 does, on the words of `text_statistics.py`. Gopher's
repetition rules are in `repetition.py`. A rule returns the reason why it rejects a document, or None.
"""

import re

from pydantic import Field

from data_tools.filters.repetition import count_duplicates
from data_tools.filters.text_statistics import (
    PUNCTUATION,
    TERMINAL_PUNCTUATION,
    TextStatistics,
    count_sentences,
    split_words,
)
from data_tools.option_types import Count, Limit, Names
from megagpt.config.parsing import Strict

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
END_OF_LINE = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class GopherQualityConfig(Strict):
    """Limits of gopher_quality."""

    min_words: Count | None = Field(default=50, description="words that are not punctuation; null: any number")
    max_words: Count | None = Field(default=100_000, description="words that are not punctuation; null: any number")
    min_mean_word_length: Limit | None = Field(default=3.0, description="in characters; null: any")
    max_mean_word_length: Limit | None = Field(default=10.0, description="in characters; null: any")
    max_symbols_per_word: Limit | None = Field(
        default=0.1, description="of '#', and of ellipses, counted separately; null: any number"
    )
    max_bullet_lines: Limit | None = Field(default=0.9, description="share of lines that start so; null: any")
    max_ellipsis_lines: Limit | None = Field(default=0.3, description="share of lines that end so; null: any")
    min_alphabetic_words: Limit | None = Field(
        default=0.8, description="share of words that contain a letter; null: any"
    )
    min_stop_words: Count | None = Field(default=2, description="different ones that must occur; null: any number")
    stop_words: Names = Field(
        default=("the", "be", "to", "of", "and", "that", "have", "with"),
        description="English; give your language's own or set rules.gopher_quality.min_stop_words=null",
    )


def gopher_quality(stats: TextStatistics, cfg: GopherQualityConfig) -> str | None:
    """Return the quality rule of Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1, 'Quality Filtering'."""
    counts, n_words = stats.counts, max(len(stats.words), 1)
    unusual = [word for word in counts if not word.isalpha()]
    symbols = [word for word in unusual if word[0] in PUNCTUATION and PUNCTUATION.issuperset(word)]
    n_plain = len(stats.words) - sum([counts[word] for word in symbols])
    if cfg.min_words is not None and n_plain < cfg.min_words:
        return f"fewer than {cfg.min_words} words"
    if cfg.max_words is not None and n_plain > cfg.max_words:
        return f"more than {cfg.max_words} words"
    length = len("".join(stats.words)) - sum([counts[word] * len(word) for word in symbols])
    mean_length = length / max(n_plain, 1)
    if cfg.min_mean_word_length is not None and mean_length < cfg.min_mean_word_length:
        return f"words shorter than {cfg.min_mean_word_length:g} on average"
    if cfg.max_mean_word_length is not None and mean_length > cfg.max_mean_word_length:
        return f"words longer than {cfg.max_mean_word_length:g} on average"
    if why := _symbols_and_lines(stats.text, n_words, cfg):
        return why
    if cfg.min_alphabetic_words is not None:
        # islower and isupper are true only for words with letters, and fast: the slow test is left for the rest
        rare = [word for word in unusual if not (word.islower() or word.isupper())]
        n_letterless = sum([counts[word] for word in rare if not any(map(str.isalpha, word))])
        if (len(stats.words) - n_letterless) / n_words < cfg.min_alphabetic_words:
            return f"share of words with a letter below {cfg.min_alphabetic_words:g}"
    if cfg.min_stop_words is not None and sum([word in counts for word in set(cfg.stop_words)]) < cfg.min_stop_words:
        return f"fewer than {cfg.min_stop_words} stop words"
    return None


def _symbols_and_lines(text: str, n_words: int, cfg: GopherQualityConfig) -> str | None:
    ellipses = text.count("...") + text.count("…")
    if cfg.max_symbols_per_word is not None:
        if text.count("#") / n_words > cfg.max_symbols_per_word:
            return f"more than {cfg.max_symbols_per_word:g} hashes per word"
        if ellipses / n_words > cfg.max_symbols_per_word:
            return f"more than {cfg.max_symbols_per_word:g} ellipses per word"
    lines = text.splitlines()
    # a text with fewer of these characters than the limit on lines needs no look at its lines
    if (limit := cfg.max_bullet_lines) is not None and text.count("-") + text.count("•") > limit * len(lines):
        bullets = sum([line.lstrip().startswith(("•", "-")) for line in lines])
        if bullets / len(lines) > limit:
            return f"share of bullet lines above {limit:g}"
    if (limit := cfg.max_ellipsis_lines) is not None and ellipses > limit * len(lines):
        ending = sum([line.rstrip().endswith(("...", "…")) for line in lines])
        if ending / len(lines) > limit:
            return f"share of lines that end in an ellipsis above {limit:g}"
    return None


class C4Config(Strict):
    """Limits and choices of c4."""

    min_sentences: Count | None = Field(default=5, description="in the remaining lines; null: any number")
    min_words_per_line: Count | None = Field(default=3, description="drop lines with fewer; null: none")
    max_word_length: Count | None = Field(default=1000, description="drop lines with a longer word; null: none")
    end_punctuation: bool = Field(default=True, description="drop lines that do not end in one of . ? ! \" '")
    citations: bool = Field(default=True, description="remove [1], [edit] and [citation needed]")
    javascript: bool = Field(default=True, description="drop lines that contain 'javascript'")
    policy_lines: bool = Field(default=True, description="drop lines about cookies, privacy and terms of use")
    lorem_ipsum: bool = Field(default=True, description="reject documents that contain 'lorem ipsum'")
    curly_brackets: bool = Field(default=True, description="reject documents with '{'; turn it off for source code")


def c4(stats: TextStatistics, cfg: C4Config) -> tuple[str, str | None]:
    """Return the rule of C4; returns (the text without the dropped lines, why the document is rejected or None).

    Raffel et al. 2020 (JMLR 21/140), section 2.2, without the list of bad words. The limit on word length and the
    policy lines are from C4's code. A line that is dropped for its form cannot reject the document.
    """
    kept, why = _kept_lines(stats.text, cfg)
    # each line is at least one sentence, so they need counting only if there are few lines
    if why is None and cfg.min_sentences is not None and len(kept) < cfg.min_sentences:
        sentences = sum(count_sentences(split_words(line)) for line in kept)
        if sentences < cfg.min_sentences:
            why = f"fewer than {cfg.min_sentences} sentences"
    return "\n".join(kept).strip(), why


def c4_lines(text: str, cfg: C4Config) -> str:
    """Return the lines that C4 keeps of a later piece, each after a newline: the piece before ends without one."""
    lines_only = cfg.model_copy(update={"lorem_ipsum": False, "curly_brackets": False})
    return "".join("\n" + line for line in _kept_lines(text, lines_only)[0])


def _kept_lines(text: str, cfg: C4Config) -> tuple[list[str], str | None]:
    """Return (the lines that are kept, why the document is rejected or None)."""
    # most texts contain none of these, so look once at the whole text rather than at each line
    lower = text.lower()
    citations = cfg.citations and "[" in text
    lorem = cfg.lorem_ipsum and "lorem ipsum" in lower
    curly = cfg.curly_brackets and "{" in text
    javascript = cfg.javascript and "javascript" in lower
    policy = POLICY if cfg.policy_lines and any(phrase in lower for phrase in POLICY) else ()
    is_special = lorem or curly or javascript or policy
    min_words, max_length = cfg.min_words_per_line or 0, cfg.max_word_length or len(text)
    kept: list[str] = []
    for line in map(str.strip, text.splitlines()):
        end = CITATION.sub("", line) if citations else line
        if cfg.end_punctuation and (not end.endswith(END_OF_LINE) or end.endswith("...")):
            continue
        if min_words and len(line.split(None, min_words - 1)) < min_words:
            continue
        if len(line) > max_length and max(map(len, line.split())) > max_length:
            continue
        if is_special:
            low = end.lower()
            if lorem and "lorem ipsum" in low:
                return kept, "lorem ipsum"
            if javascript and "javascript" in low:
                continue
            if curly and "{" in end:
                return kept, "a curly bracket"
            if any(phrase in low for phrase in policy):
                continue
        kept.append(end)
    return kept, None


class FineWebConfig(Strict):
    """Limits of fineweb."""

    min_punctuated_lines: Limit | None = Field(
        default=0.12, description="share of lines that end in terminal punctuation; null: any"
    )
    max_short_lines: Limit | None = Field(default=0.67, description="share of lines that are short; null: any")
    short_line: Count = Field(default=30, description="the most characters of a short line")
    max_duplicate_line_characters: Limit | None = Field(
        default=0.01, description="share of the characters in lines that repeat an earlier one; null: any"
    )
    max_newlines_per_word: Limit | None = Field(default=0.3, description="lists have more; null: any")


def fineweb(stats: TextStatistics, cfg: FineWebConfig) -> str | None:
    """Return the custom filters of Penedo et al. 2024 (arXiv 2406.17557), section 3.6."""
    text = stats.text
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines:
        return "no text"
    n = len(lines)
    if (limit := cfg.min_punctuated_lines) is not None:
        punctuated = sum([line[-1] in TERMINAL_PUNCTUATION for line in lines])
        if punctuated / n < limit:
            return f"share of lines with end punctuation below {limit:g}"
    if (limit := cfg.max_short_lines) is not None:
        short = sum([length <= cfg.short_line for length in map(len, lines)])
        if short / n > limit:
            return f"share of short lines above {limit:g}"
    newlines = text.count("\n")
    if (limit := cfg.max_duplicate_line_characters) is not None:
        _, characters = count_duplicates(lines)
        if characters / (len(text) - newlines) > limit:
            return f"share of characters in duplicate lines above {limit:g}"
    if (limit := cfg.max_newlines_per_word) is not None:
        # there are at least as many words, which take longer to find
        n_chunks = len(text.split())
        if newlines / n_chunks > limit and newlines / len(stats.words) > limit:
            return f"more than {limit:g} newlines per word"
    return None
