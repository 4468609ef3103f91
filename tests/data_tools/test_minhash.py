"""Digests and signatures of documents: which texts have equal ones, wherever the text is cut into pieces."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.dedup.minhash import MinHash, TextDigest

N_HASHES, NGRAM = 112, 5


def digest(*pieces: str) -> bytes:
    found = TextDigest()
    for piece in pieces:
        found.update(piece)
    return found.digest()


def signature(*pieces: str, seed: int = 1234, ngram: int = NGRAM) -> MinHash:
    found = MinHash(N_HASHES, ngram, seed)
    for piece in pieces:
        found.update(piece)
    return found


def runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def overlapping(n_words: int, n_common: int, rng: random.Random) -> tuple[str, str]:
    """Two texts of random words with the first n_common in common, so that their similarity is known."""
    words = [f"w{rng.getrandbits(48)}" for _ in range(2 * n_words - n_common)]
    return " ".join(words[:n_words]), " ".join(words[:n_common] + words[n_words:])


@pytest.mark.parametrize(
    "text",
    [
        "one  two\tthree\nfour\r\n",
        "  one two three four",
        "one two\u00a0three\u2003four",
        "one\n\n\ntwo three four",
        "onetwo threefour",
    ],
)
def test_white_space_makes_no_difference_to_the_digest(text):
    assert digest(text) == digest("one two three four")


def test_the_form_of_unicode_makes_no_difference_to_the_digest():
    assert digest("caf\u00e9") == digest("cafe\u0301")


def test_anything_else_makes_a_difference_to_the_digest():
    texts = ["one two", "One two", "one, two", "two one", "one two one two", "", "\ufb01", "fi"]
    assert len({digest(text) for text in texts}) == len(texts)


@given(st.lists(st.text(st.sampled_from("ab \n\u00a0")), max_size=6))
def test_pieces_have_the_digest_of_the_whole(pieces):
    assert digest(*pieces) == digest("".join(pieces))


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=8), max_size=6), st.integers(1, 6))
def test_pieces_cut_between_words_have_the_signature_of_the_whole(pieces, ngram):
    texts = ["".join(f"{word} " for word in words) for words in pieces]
    parts, whole = signature(*texts, ngram=ngram), signature("".join(texts), ngram=ngram)
    assert parts.band_keys(14) == whole.band_keys(14)
    assert parts.values.tolist() == whole.values.tolist()


def test_the_signature_of_pieces_is_the_smallest_of_their_signatures():
    one, other = (" ".join(f"{name}{i}" for i in range(50)) for name in "ab")
    joint = " ".join(one.split()[-4:] + other.split()[:4])  # the runs across the cut
    smallest = np.minimum.reduce([signature(text).values for text in (one, other, joint)])
    assert signature(one + "\n", other).values.tolist() == smallest.tolist()


@pytest.mark.parametrize("n_common", [44, 104, 164, 184])
def test_signatures_estimate_similarity_as_datasketch_does(n_common):
    import datasketch

    rng = random.Random(n_common)
    ours, theirs = [], []
    for seed in range(60):
        pair = overlapping(200, n_common, rng)
        a, b = (signature(text, seed=seed).values for text in pair)
        ours.append(np.mean(a == b))
        c, d = (datasketch.MinHash(N_HASHES, seed=seed) for _ in pair)
        for sketch, text in zip((c, d), pair, strict=True):
            sketch.update_batch([run.encode() for run in runs(text)])
        theirs.append(c.jaccard(d))
    true = len(runs(pair[0]) & runs(pair[1])) / len(runs(pair[0]) | runs(pair[1]))
    one_estimate = (true * (1 - true) / N_HASHES) ** 0.5  # its standard error
    for estimates in (ours, theirs):
        assert abs(np.mean(estimates) - true) < 4 * one_estimate / 60**0.5
        assert 0.6 * one_estimate < np.std(estimates) < 1.4 * one_estimate  # 4 standard errors of 60 are 0.37
    assert abs(np.mean(np.subtract(ours, theirs))) < 4 * 2**0.5 * one_estimate / 60**0.5


def test_a_document_shorter_than_a_run_is_one_run():
    assert signature("one two").band_keys(14) == signature("One, two!").band_keys(14)
    assert signature("one two").band_keys(14) != signature("two one").band_keys(14)
    assert signature("one", "\ntwo").band_keys(14) == signature("one two").band_keys(14)


def test_a_document_without_words_has_no_bands():
    assert signature("").band_keys(14) == signature("?! ...", "--").band_keys(14) == b""


def test_the_seed_decides_the_signature():
    text = " ".join(map(str, range(50)))
    assert signature(text, seed=1).values.tolist() != signature(text, seed=2).values.tolist()


def test_fingerprints_are_the_same_on_every_machine():
    text = "A robot may not injure a human being or, through inaction, allow a human being to come to harm."
    assert digest(text).hex() == "da40488400d9bf16ea93481bbe6574f0"
    keys = signature(text).band_keys(14)
    assert len(keys) == 14 * 16
    assert keys[:16].hex() == "8c92cb1b52d71d773bdb456e34fb5769"
