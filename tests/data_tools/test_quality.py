"""Published quality rules, on documents counted by hand on both sides of each threshold, and word splitting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.filters.quality import C4Config, FineWebConfig, GopherQualityConfig, c4, fineweb, gopher_quality
from data_tools.filters.repetition import GopherRepetitionConfig, count_duplicates, gopher_repetition
from data_tools.filters.text_statistics import TextStatistics, count_sentences, split_words

# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The end.", "The end ."),
        ("foo (bar), isn't.", "foo ( bar ) , is n't ."),
        ("e.g. the U.S. and NASA.", "e.g. the U.S. and NASA ."),
        ("a well-known and/or a,b", "a well - known and / or a , b"),
        ("x=3 f(x)[0] a_b __init__", "x=3 f(x)[0 ] a_b _ _ init _ _"),
        ("5% $10 1-2 10:30 3.5.", "5 % $ 10 1 - 2 10:30 3.5 ."),
        ("see https://a.bc/d-e?f=g.", "see https://a.bc/d-e?f=g ."),
        ("wait...what... ...", "wait ... what ... ..."),
        ("def f(): pass", "def f ( ): pass"),
        ("“It’s”", "“ It ’s ”"),  # noqa: RUF001
        ("== -- ├──", "= = -- ├ ─ ─"),
    ],
)
def test_words_are_those_of_the_tokenizer_that_the_thresholds_were_made_with(text, words):
    assert split_words(text) == words.split()


@given(st.text(st.sampled_from("ab.B1'\u2019,:;-\u2013—_=+$%()[]{}/@#*…\"├ \n\t\u00e9\U0001f600"), max_size=60))
def test_a_split_loses_white_space_only(text):
    assert "".join(split_words(text)) == "".join(text.split())


def test_words_do_not_depend_on_what_was_split_before():
    text = "one two, (three)."
    first = split_words(text)
    for i in range(70_000):  # more than are remembered
        split_words(f"x{i}")
    assert split_words(text) == first


@pytest.mark.parametrize("text", ["..(" * 50_000, "a's" * 50_000, "a.b" * 50_000, "'" * 150_000, "x@" * 50_000])
def test_a_long_chunk_is_split_in_reasonable_time(text):
    assert "".join(split_words(text)) == text


def test_sentences_end_with_a_word_that_is_end_punctuation():
    for text, n in {
        "One. Two! 3.5 (e.g. this)?": 3,
        "No end": 1,
        'He said "stop." Then left.': 2,
        "Wait... what": 1,
    }.items():
        assert count_sentences(split_words(text)) == n


# --- Gopher quality -----------------------------------------------------------------------------------------------


def quality(text: str, **options: object) -> str | None:
    """With every rule off but those named."""
    off = {name: None for name in GopherQualityConfig.model_fields if name != "stop_words"}
    return gopher_quality(TextStatistics(text), GopherQualityConfig.model_validate(off | options))


@pytest.mark.parametrize(
    ("inside", "outside", "options", "reason"),
    [
        # punctuation does not count as words here, so the full stops do not help
        ("word " * 50, "word " * 49 + ". . .", {"min_words": 50}, "fewer than 50 words"),
        ("word " * 60 + ". .", "word " * 61, {"max_words": 60}, "more than 60 words"),
        ("abc " * 9 + ". .", "abc " * 9 + "ab", {"min_mean_word_length": 3.0}, "words shorter than 3 on average"),
        ("abcdefghij " * 9, "abcdefghij " * 9 + "abcdefghijk", {"max_mean_word_length": 10.0}, "words longer than 10"),
        ("word " * 9 + "#", "word " * 8 + "#", {"max_symbols_per_word": 0.1}, "more than 0.1 hashes"),
        ("word " * 9 + "...", "word " * 8 + "…", {"max_symbols_per_word": 0.1}, "more than 0.1 ellipses"),
        ("- a\n" * 9 + "b", "- a\n" * 6 + " • a\n" * 4, {"max_bullet_lines": 0.9}, "bullet lines above 0.9"),
        ("a...\n" * 3 + "b\n" * 7, "a…\n" * 3 + "b\n" * 6, {"max_ellipsis_lines": 0.3}, "end in an ellipsis above 0.3"),
        ("word " * 8 + "1 2", "word " * 7 + "1 2", {"min_alphabetic_words": 0.8}, "words with a letter below 0.8"),
        ("x1 " * 8 + "1 2", "½1 " * 8 + "1 2", {"min_alphabetic_words": 0.8}, "words with a letter below 0.8"),
        ("the cat of", "the the The cats", {"min_stop_words": 2}, "fewer than 2 stop words"),
    ],
)
def test_gopher_quality_on_either_side_of_its_thresholds(inside, outside, options, reason):
    assert quality(inside, **options) is None
    assert reason in str(quality(outside, **options))


def test_a_text_without_words_has_too_few():
    for text in ("", " \n\n", "...\n"):
        assert gopher_quality(TextStatistics(text), GopherQualityConfig()) == "fewer than 50 words"
        assert quality(text, max_symbols_per_word=1.0, max_bullet_lines=0.5, min_stop_words=0) is None


# --- Gopher repetition --------------------------------------------------------------------------------------------


def repetition(text: str, **options: object) -> str | None:
    """With every rule off but those named."""
    off = {name: [] if "ngrams" in name else None for name in GopherRepetitionConfig.model_fields}
    return gopher_repetition(TextStatistics(text), GopherRepetitionConfig.model_validate(off | options))


def distinct(n: int) -> list[str]:
    """Words of four letters."""
    return [f"w{i:03d}" for i in range(n)]


LINES = [f"line {i}" for i in range(7)]  # of 6 characters


@pytest.mark.parametrize(
    ("inside", "outside", "options", "reason"),
    [
        # 3 of 10 lines repeat one, then 3 of 9
        ("\n".join([*LINES, *LINES[:3]]), "\n\n".join([*LINES[:6], *LINES[:3]]), {"max_duplicate_lines": 0.3}, "lines"),
        (
            "\n\n".join([*LINES, *LINES[:3]]),
            "\n\n\n".join([*LINES[:6], *LINES[:3]]),
            {"max_duplicate_paragraphs": 0.3},
            "duplicate paragraphs",
        ),
        # 6 characters of 30, then of 29
        ("\n".join(["line 0", "line 0", "x" * 16]), "\n".join(["line 0", "line 0", "x" * 15]),
         {"max_duplicate_line_characters": 0.2}, "characters in duplicate lines"),
        ("\n\n".join(["line 0", "line 0", "x" * 14]), "\n\n".join(["line 0", "line 0", "x" * 13]),
         {"max_duplicate_paragraph_characters": 0.2}, "characters in duplicate paragraphs"),
        # "ab cd" twice is 10 characters of 50, then of 49
        ("ab cd " * 2 + "x" * 38, "ab cd " * 2 + "x" * 37, {"max_top_ngrams": [[2, 0.2]]}, "most frequent 2-gram"),
        # the second copy of 5 words of 2 letters is 10 characters of 100, then of 99
        ("aa bb cc dd ee " * 2 + "x" * 70, "aa bb cc dd ee " * 2 + "x" * 69, {"max_duplicate_ngrams": [[5, 0.1]]},
         "duplicate 5-grams"),
    ],
)  # fmt: skip
def test_gopher_repetition_on_either_side_of_its_thresholds(inside, outside, options, reason):
    assert repetition(inside, **options) is None
    assert reason in str(repetition(outside, **options))


def test_prose_that_repeats_nothing_passes_the_published_thresholds():
    text = "\n".join(" ".join(distinct(600)[i : i + 10]) for i in range(0, 600, 10))
    assert gopher_repetition(TextStatistics(text), GopherRepetitionConfig()) is None
    assert gopher_repetition(TextStatistics(text * 2), GopherRepetitionConfig()) == "duplicate lines"


def top_ngram_characters(words: list[str], n: int) -> int:
    """As datatrove computes it."""
    ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    most = max(map(ngrams.count, ngrams), default=0)
    first = next((ngram for ngram in ngrams if ngrams.count(ngram) == most), "")
    return most * len(first)


def duplicate_ngram_characters(words: list[str], n: int) -> int:
    """As datatrove computes it."""
    seen, characters, i = set(), 0, 0
    while i < len(words) - n + 1:
        ngram = tuple(words[i : i + n])
        if ngram in seen:
            characters += len("".join(ngram))
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=40), st.integers(2, 6))
def test_ngrams_are_counted_as_a_plain_loop_counts_them(words, n):
    text = " ".join(words)
    for key, characters, reason in (
        ("max_top_ngrams", top_ngram_characters(words, n), "most frequent"),
        ("max_duplicate_ngrams", duplicate_ngram_characters(words, n), "duplicate"),
    ):
        share = characters / len(text)
        assert repetition(text, **{key: [[n, share * 1.000001]]}) is None
        if characters:
            assert reason in str(repetition(text, **{key: [[n, share * 0.999999]]}))


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=60))
def test_looking_at_all_lengths_finds_what_each_length_alone_finds(words):
    text = " ".join(words)
    limits = [[5, 0.3], [6, 0.28], [7, 0.26], [9, 0.1], [10, 0.08]]
    alone = [repetition(text, max_duplicate_ngrams=[limit]) for limit in limits]
    assert repetition(text, max_duplicate_ngrams=limits) == next(filter(None, alone), None)


@given(st.lists(st.sampled_from(["", "a", "bb"])))
def test_duplicates_are_those_that_came_before(parts):
    repeated = [part for i, part in enumerate(parts) if part in parts[:i]]
    assert count_duplicates(parts) == (len(repeated), len("".join(repeated)))


# --- C4 -----------------------------------------------------------------------------------------------------------

SENTENCE = "This line has words in it."


def c4_of(*lines: str, **options: object) -> tuple[list[str], str | None]:
    text, why = c4(TextStatistics("\n".join(lines)), C4Config.model_validate({"min_sentences": None} | options))
    return text.splitlines(), why


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ("It ends with a full stop.", "It ends with none"),
        ('He said "stop"', "It goes on..."),
        ("  Three words suffice.  ", "Two words."),
        ("one two " + "x" * 999 + ".", "one two " + "x" * 1000 + "."),
        ("We like scripts of Java.", "Please enable JavaScript now."),
        ("We like cookies a lot.", "This site uses cookies a lot."),
    ],
)
def test_c4_keeps_lines_that_are_sentences(kept, dropped):
    assert c4_of(kept, dropped) == ([kept.strip()], None)


def test_c4_removes_citations():
    assert c4_of("It is so.[1] It was.[citation needed]", "This is [1]") == (["It is so. It was."], None)
    assert c4_of("It is so.[1]", citations=False) == ([], None)


def test_c4_rejects_documents_for_lines_that_it_would_keep():
    assert c4_of(SENTENCE, "This has a { in it.")[1] == "a curly bracket"
    assert c4_of(SENTENCE, "Lorem Ipsum is not text.")[1] == "lorem ipsum"
    assert c4_of(SENTENCE, "lorem ipsum", "{") == ([SENTENCE], None)
    assert c4_of(SENTENCE, "This JavaScript has a { in it.") == ([SENTENCE], None)
    assert c4_of("This has a { in it.", curly_brackets=False)[1] is None


def test_c4_wants_five_sentences():
    assert c4_of(*[SENTENCE] * 5, min_sentences=5)[1] is None
    assert c4_of(*[SENTENCE] * 4, min_sentences=5)[1] == "fewer than 5 sentences"
    assert c4_of("We came. We saw. We won. We left.", "And that is all.", min_sentences=5)[1] is None


# --- FineWeb ------------------------------------------------------------------------------------------------------

LONG = "a line of more than thirty characters"


def fineweb_of(text: str, **options: object) -> str | None:
    off = {name: None for name in FineWebConfig.model_fields if name != "short_line"}
    return fineweb(TextStatistics(text), FineWebConfig.model_validate(off | options))


@pytest.mark.parametrize(
    ("inside", "outside", "options", "reason"),
    [
        (
            "a.\n" * 12 + "b\n" * 88,
            "a。\n" * 11 + "b\n\n" * 89,
            {"min_punctuated_lines": 0.12},
            "end punctuation below",
        ),
        ("x" * 30 + f"\n{LONG}\n" + "y\n", "x" * 30 + "\ny\n" + "z\n", {"max_short_lines": 0.67}, "short lines above"),
        ("x" * 31 + "\ny\nz", "x" * 30 + "\ny\nz", {"max_short_lines": 0.67}, "short lines above"),
        # 2 characters of 200, then of 199
        (
            "ab\nab\n" + "x" * 196,
            "ab\nab\n" + "x" * 195,
            {"max_duplicate_line_characters": 0.01},
            "duplicate lines above",
        ),
        ("w w w w w w w\n" + "w w w\n" * 2, "w w w\n" * 3, {"max_newlines_per_word": 0.3}, "newlines per word"),
    ],
)
def test_fineweb_on_either_side_of_its_thresholds(inside, outside, options, reason):
    assert fineweb_of(inside, **options) is None
    assert reason in str(fineweb_of(outside, **options))


def test_fineweb_rejects_a_text_without_text():
    assert fineweb_of(" \n\n") == "no text"
