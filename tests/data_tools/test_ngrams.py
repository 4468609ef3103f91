"""Hashes of words and n-grams: equal exactly for equal words in the same order."""

import unicodedata

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.dedup.ngrams import WORD, ngram_hashes, word_hashes


@given(st.text())
@example("a_1\x1f\x85\u00a0\u2028b\u3002\u0660c\u0301\U0001f600\x00")
def test_words_are_those_of_the_expression(text):
    words = WORD.findall(unicodedata.normalize("NFC", text).casefold())
    assert word_hashes(text).tolist() == [xxhash.xxh3_64_intdigest(word.encode()) for word in words]


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
