"""A sampled tokenization decodes to the text, is the same in every process, and follows the papers' formulas."""

import subprocess
import sys

import numpy as np
import pytest
from data_support import document, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from data_tools.stages.subword_sampling import CANDIDATES, SubwordSampler

TEXT = document(3, n_words=200) + "caf\u00e9 \u2581 \u6f22\u5b57 \U0001f600\r\n</s> \0"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])), key=st.binary(max_size=4))
def test_a_drawn_tokenization_decodes_to_the_text(kind: str, text: str, key: bytes) -> None:
    tokenizer = small_tokenizer(kind)
    ids = SubwordSampler(tokenizer, 0.3, seed=1).encode(text, key)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_keys_and_seeds_draw_different_tokenizations_and_equal_ones_the_same(kind: str) -> None:
    def draw(seed: int, key: bytes) -> list[int]:
        return SubwordSampler(small_tokenizer(kind), 0.3, seed).encode(TEXT, key).tolist()

    assert draw(1, b"a") == draw(1, b"a")
    assert draw(1, b"a") != draw(1, b"b")
    assert draw(1, b"a") != draw(2, b"a")
    assert draw(1, b"a") != small_tokenizer(kind).encode(TEXT).tolist()


@pytest.mark.process
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_another_process_draws_the_same(kind: str) -> None:
    script = (
        "from data_support import document, small_tokenizer; "
        "from data_tools.stages.subword_sampling import SubwordSampler; "
        f"print(SubwordSampler(small_tokenizer({kind!r}), 0.3, 7).encode(document(3), b'key').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(
        SubwordSampler(small_tokenizer(kind), 0.3, 7).encode(document(3), b"key").tolist()
    )


def test_unigram_draws_a_words_tokenizations_in_proportion_to_their_likelihood_to_the_alpha() -> None:
    tokenizer, alpha, n = small_tokenizer("unigram"), 0.5, 20_000
    found = tokenizer.best(" models", CANDIDATES)
    assert len(found) >= 2
    shares = np.exp(alpha * np.array([score for score, _ in found]))
    shares /= shares.sum()
    ids = SubwordSampler(tokenizer, alpha, seed=1).encode(" models" * n, b"")
    counts = _count(ids.tolist(), [tuple(candidate) for _, candidate in found])
    # five standard deviations of a binomial
    assert np.all(np.abs(counts / n - shares) < 5 * np.sqrt(shares * (1 - shares) / n) + 1e-9)


def _count(ids: list[int], candidates: list[tuple[int, ...]]) -> np.ndarray:
    """The frequency of each candidate in the sequence, read from left to right by the longest that fits."""
    counts, at = np.zeros(len(candidates)), 0
    order = sorted(range(len(candidates)), key=lambda i: -len(candidates[i]))
    while at < len(ids):
        i = next(i for i in order if tuple(ids[at : at + len(candidates[i])]) == candidates[i])
        counts[i] += 1
        at += len(candidates[i])
    return counts


def test_bpe_without_dropped_merges_is_the_canonical_tokenization() -> None:
    tokenizer = small_tokenizer("bpe")
    texts = [document(i) for i in range(20)]
    sampler = SubwordSampler(tokenizer, 0.0, seed=1)
    assert [sampler.encode(text, b"").tolist() for text in texts] == [tokenizer.encode(text).tolist() for text in texts]


def test_bpe_with_every_merge_dropped_is_single_characters() -> None:
    tokenizer = small_tokenizer("bpe")
    ids = SubwordSampler(tokenizer, 1.0, seed=1).encode("the cat", b"")
    assert [tokenizer.decode([i]) for i in ids.tolist()] == list("the cat")


def test_a_lower_alpha_draws_longer_tokenizations() -> None:
    tokenizer = small_tokenizer("unigram")
    lengths = [len(SubwordSampler(tokenizer, alpha, 1).encode(TEXT, b"")) for alpha in (0.05, 0.3, 1.0)]
    assert lengths[0] > lengths[1] > lengths[2] >= len(tokenizer.encode(TEXT)) - 3
