"""Training a tokenizer: the vocabulary sizes that messages advise, and texts that SentencePiece does not expect."""

import random
import re
from pathlib import Path

import pytest
from data_support import document, run
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import TokenizerConfig
from data_tools.stages.train_tokenizer import _without_long_words, train_sample
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer

KINDS = ("unigram", "bpe", "char")
TEXTS = {
    "prose": document(1, n_words=500),
    "no space": "ACGTTGCAGGCATTACG" * 30,
    "one letter": "aaaa",
    "spaces only": "   ",
    "many characters": "".join(map(chr, range(0x4E00, 0x4F00))) + "the cat " * 9,
}
WORDS = ["the", "cat", "foo(", "\u65e5\u672c", "\u0436", "\U0001f389", "    ", "\t", "\n", "\0", "\u2581", "ACGT", "\r"]


def advice(text: str, kind: str, vocab_size: int) -> int | None:
    """Train; return the size that the message names, or None if there is no message."""
    config = TokenizerConfig(tokenizer_type=kind, vocab_size=vocab_size)
    try:
        train_sample([text], config)
    except UserError as error:
        [named] = re.findall(r"set vocab_size=(\d+), the (?:least|most)", str(error))
        return int(named)
    return None


@pytest.mark.parametrize("vocab_size", [1, 2, 100, 263, 100_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_vocab_size_that_a_message_names_trains(text: str, kind: str, vocab_size: int) -> None:
    named = advice(text, kind, vocab_size)
    if named is not None:
        assert advice(text, kind, named) is None


@settings(max_examples=10, derandomize=True)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).filter(
        lambda words: "".join(words).strip("\0\n\t")
    ),
    kind=st.sampled_from(KINDS),
    vocab_size=st.one_of(st.integers(1, 280), st.just(32000)),
)
def test_a_vocab_size_that_a_message_names_trains_whatever_the_text(
    words: list[str], kind: str, vocab_size: int
) -> None:
    named = advice("".join(words), kind, vocab_size)
    if named is not None:
        assert advice("".join(words), kind, named) is None


def test_the_least_vocabulary_of_characters_holds_the_space() -> None:
    """SentencePiece orders characters by frequency: in 'aabb c' the space is the third or fourth."""
    assert advice("aaabbb c", "char", 262) == 261 + 4  # a and b come before, and c, as rare, by its code
    model = Tokenizer(train_sample(["aaabbb c"], TokenizerConfig(tokenizer_type="char", vocab_size=265)))
    assert model.round_trips("c a\u00e9 b")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("vocab_size=99999999999", r"vocab_size=99999999999 is too large; .* at most 16777216"),
        ("vocab_size=0", r"vocab_size=0 is too small; .* more than 0"),
        ("sample_bytes=" + "9" * 17, r"sample_bytes=9+ is too large; .* at most 1000000000000000"),
    ],
)
def test_a_number_out_of_bounds_is_one_message(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    assert run("train-tokenizer", "--input", tmp_path / "a.txt", "--out", tmp_path / "a.model", option) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_a_sample_of_few_bytes_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(document(1, n_words=50_000))
    arguments = ("train-tokenizer", "--input", tmp_path / "a.txt", "--out", tmp_path / "a.model")
    assert run(*arguments, "sample_bytes=1", "vocab_size=300") == 0


# --- unigram on text without spaces -----------------------------------------------------------------------------


def write_dna(folder: Path) -> Path:
    """4,000 letters in lines of 60, as in FASTA, with some prose."""
    rng = random.Random(0)
    lines = ["".join(rng.choices("ACGT", k=60)) for _ in range(70)]
    (folder / "a.txt").write_text("\n".join([document(1, n_words=100), *lines]))
    return folder / "a.txt"


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ((), "bpe", "so tokenizer_type is bpe"),
        (("tokenizer_type=unigram",), "unigram", "so it takes the first 1,000 of them"),
        (("tokenizer_type=unigram", "sample_bytes=8000000"), "unigram", "unigram may take minutes or hours"),
        (("tokenizer_type=bpe",), "bpe", ""),
        (("tokenizer_type=char",), "char", ""),
    ],
)
def test_unigram_is_not_trained_for_hours_on_text_without_spaces(
    options: tuple[str, ...],
    kind: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_tools.stages.train_tokenizer.MOST_UNSPACED", 1000)
    out = tmp_path / "a.model"
    arguments = ("--input", write_dna(tmp_path), "--out", out, "vocab_size=300", *options)
    assert run("train-tokenizer", *arguments) == 0
    shown = capsys.readouterr()
    assert Tokenizer.load(out).kind == kind
    assert f"{out} is ready: {kind}" in shown.out
    assert shown.err.count("warning: ") == bool(told)
    assert "4,200 of the" in shown.err or not told
    assert "of 4 letters" in shown.err or not told
    assert told in shown.err


def test_text_with_spaces_or_many_letters_is_trained_on_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.stages.train_tokenizer.MOST_UNSPACED", 1000)
    rng = random.Random(0)
    (tmp_path / "prose.txt").write_text(document(1, n_words=1000))
    (tmp_path / "chinese.txt").write_text("".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(3000)))
    for name, most in (("prose.txt", 1000), ("chinese.txt", 3000), ("chinese.txt", 2999)):
        monkeypatch.setattr("data_tools.stages.train_tokenizer.MOST_OF_MANY_LETTERS", most)
        arguments = ("--input", tmp_path / name, "--out", tmp_path / "a.model", "tokenizer_type=unigram")
        assert run("train-tokenizer", *arguments, f"vocab_size={518 if name == 'chinese.txt' else 300}") == 0
        assert ("unigram may take minutes or hours" in capsys.readouterr().err) == (most == 2999)


@pytest.mark.parametrize(
    ("times", "has_warning"),
    [(1, True), (4, False)],
    ids=["most of the text", "a fifth of it, as in source code"],
)
def test_long_words_are_no_matter_where_they_are_few_or_repeat(
    times: int, has_warning: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.stages.train_tokenizer.MOST_UNSPACED", 1000)
    rng = random.Random(0)
    words = ["".join(rng.choices("ACGT", k=36)) for _ in range(60)]  # reads of DNA
    prose = document(1, n_words=450 * times)
    (tmp_path / "a.txt").write_text("\n".join([prose, *words, *words[:10] * times]))
    arguments = ("--input", tmp_path / "a.txt", "--out", tmp_path / "a.model", "vocab_size=300")
    assert run("train-tokenizer", *arguments) == 0
    err = capsys.readouterr().err
    assert ("tokenizer_type is bpe" in err) == has_warning
    assert ("2,160 of the" in err) == has_warning


def test_only_what_has_no_spaces_is_cut() -> None:
    sample = ["a b " + "x" * 60, "y" * 50 + " c", "z" * 32 + " d " + "z" * 31]
    assert _without_long_words(sample, 110) == [*sample[:2], " d " + "z" * 31]
    assert _without_long_words(sample, 0) == ["a b ", " c", " d " + "z" * 31]
