"""Words and runs of words as numbers: the same words, the same numbers, and no others."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_tools.words import WORD, ngram_hashes, word_hashes


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_finds_the_words_of_the_expression(text):
    expected = [xxhash.xxh3_64_intdigest(word.encode()) for word in WORD.findall(text.casefold())]
    assert word_hashes(text).tolist() == expected


@given(st.text(), st.text())
def test_a_character_beyond_ascii_changes_no_other_word(before, after):
    whole = word_hashes(f"{before} \u3002 {after}")  # an ideographic full stop, which is no word
    assert whole.tolist() == word_hashes(before).tolist() + word_hashes(after).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat, sat!", "the CAT sat"),
        ("Straße", "STRASSE"),
        ("caf\u00e9 au lait", "cafe\u0301 au lait"),  # composed, decomposed
        ("ÉTÉ\tà Łódź", "été À ŁÓDŹ."),
    ],
)
def test_case_punctuation_and_the_form_of_unicode_make_no_difference(one, other):
    assert word_hashes(one).tolist() == word_hashes(other).tolist()


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_two_runs_are_equal_exactly_if_their_words_are(words, n):
    hashes = word_hashes(" ".join(map(str, words)))
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    numbers = ngram_hashes(hashes, n).tolist()
    assert len(numbers) == len(runs)
    assert len(set(numbers)) == len(set(runs)) == len(set(zip(numbers, runs, strict=True)))


def test_words_and_runs_are_the_same_numbers_on_every_machine():
    words = word_hashes("GPT-2: 124M, naïve")
    assert words.dtype == np.uint64
    assert words.tolist() == [2132436494849204386, 18128579709034668820, 16050948934147540743, 14757376859149137928]
    assert ngram_hashes(words, 4).tolist() == [15971701301405362569]
