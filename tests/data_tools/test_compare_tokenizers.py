"""The comparison of tokenizers: ratios worked out by hand, and the bits per byte of a small model."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data_support import lossy_tokenizer, run, small_tokenizer, write_texts
from support import write_corpus

import data_tools.compare_tokenizers
from data_tools.build import build
from data_tools.compare_tokenizers import compare_tokenizers, measure
from data_tools.config import BuildConfig


@pytest.fixture(scope="module")
def char_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One piece for each letter of a few words, bytes for all else."""
    path = tmp_path_factory.mktemp("model") / "char.model"
    path.write_bytes(small_tokenizer("char").model_bytes)
    return path


def write(folder: Path, **texts: str) -> list[str]:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [str(folder / f"{name}.txt") for name in texts]


def test_ratios_are_what_one_counts_by_hand(tmp_path: Path, char_model: Path) -> None:
    paths = write(tmp_path, plain="the cat", accents="a é\n")  # é: two bytes, no piece
    [row] = compare_tokenizers(paths, BuildConfig(), models=[char_model], kinds=(), steps=0)
    assert (row["tokenizer"], row["type"], row["vocab_size"]) == (
        str(char_model),
        "char",
        small_tokenizer("char").vocab_size,
    )
    plain, accents = row["sources"]["plain.txt"], row["sources"]["accents.txt"]
    assert (plain["bytes_per_token"], plain["tokens_per_word"], plain["fallback_share"]) == (1.0, 7 / 2, 0.0)
    # a, space, two bytes, newline: 5 tokens for 5 bytes and 2 words
    assert (accents["bytes_per_token"], accents["tokens_per_word"], accents["fallback_share"]) == (1.0, 5 / 2, 2 / 5)
    assert (row["bytes_per_token"], row["tokens_per_word"], row["fallback_share"]) == (1.0, 12 / 4, 2 / 12)
    assert "bits_per_byte" not in row


def test_a_longer_piece_counts_once() -> None:
    tokenizer = small_tokenizer("unigram")
    ids = tokenizer.encode("the models that learn")
    counts = measure(tokenizer, ["the models", " that learn"])
    assert (counts.bytes, counts.words, counts.fallback) == (21, 4, 0)
    assert counts.tokens == len(ids) < 21


def test_it_counts_what_a_build_with_the_same_options_would(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 40)
    options = BuildConfig(vocab_size=300, val_fraction=0.2)
    unigram, bpe = compare_tokenizers([str(tmp_path / "in")], options, models=(), kinds=("unigram", "bpe"), steps=0)
    report = build([tmp_path / "in"], tmp_path / "out", options)
    tokens = report["tokens"] - report["documents"]  # without the end of each
    assert unigram["bytes_per_token"] == pytest.approx(report["bytes"] / tokens, rel=1e-12)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["sample_sha256"] == unigram["sample_sha256"] == bpe["sample_sha256"]


def test_what_was_rejected_is_not_measured(tmp_path: Path, char_model: Path) -> None:
    paths = write(tmp_path, kept="the cat", copy="the cat")
    [row] = compare_tokenizers(paths, BuildConfig(), models=[char_model], kinds=(), steps=0)
    assert row["sources"]["kept.txt"]["tokens_per_word"] == 3.5
    assert set(row["sources"]["copy.txt"].values()) == {None}


def test_of_a_large_source_a_part_is_measured_the_same_for_all(
    tmp_path: Path, char_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in", 200)
    write_texts(tmp_path / "in" / "others", 200, n_words=61)
    seen: list[int] = []

    def noted(tokenizer, texts):  # what is measured, and how much it was
        counts = measure(tokenizer, texts)
        seen.append(counts.bytes)
        return counts

    monkeypatch.setattr(data_tools.compare_tokenizers, "measure", noted)
    for limit in (10**9, 40_000):
        monkeypatch.setattr(data_tools.compare_tokenizers, "MEASURED_BYTES", limit)
        arguments = [str(tmp_path / "in")], BuildConfig(dedup={"method": "none"})
        compare_tokenizers(*arguments, models=[char_model, char_model], kinds=(), steps=0)
    whole, whole_again, part, part_again = seen
    assert (whole, part) == (whole_again, part_again)
    assert whole == sum(path.stat().st_size for path in (tmp_path / "in").rglob("*.txt"))
    # of 400 documents of some 320 bytes, about 125 are drawn: 9 is one standard deviation
    assert part == pytest.approx(40_000, rel=0.3)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_model_trained_on_it_has_fewer_than_8_bits_per_byte(
    tmp_path: Path, char_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 150)
    options = ("val_fraction=0.2", "vocab_size=300", "workers=1")
    assert run("compare-tokenizers", "--input", corpus, "--types", "unigram", "--steps", "30", "--json", *options) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert 0 < row["bits_per_byte"] < 4  # what tells 16 letters apart; untrained: more than 8 bits for each token


def test_the_table_has_a_row_for_each_tokenizer_and_each_source(
    tmp_path: Path, char_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write(tmp_path, plain="the cat", accents="a é\n")
    assert run("compare-tokenizers", "--input", *paths, "--tokenizer", char_model, "--steps", "0") == 0
    head, row, empty, *per_source = capsys.readouterr().out.splitlines()
    columns = ["tokenizer", "type", "vocabulary", "bytes/token", "tokens/word", "fallback", "lost", "MB/s", "bits/byte"]
    assert head.split() == columns
    assert row.split()[:7] == [str(char_model), "char", "276", "1.000", "3.000", "16.667%", "0.000%"]
    assert row.split()[-1] == "-"
    assert empty == ""
    assert [line.split() for line in per_source] == [
        ["tokens/word", str(char_model)],
        ["plain.txt", "3.500"],
        ["accents.txt", "2.500"],
    ]


def no_model(folder: Path) -> list[str | Path]:
    (folder / "x.model").write_bytes(b"no model")
    return ["--tokenizer", folder / "x.model"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "no such model": (lambda _: ["--tokenizer", "no.model"], r"cannot read the tokenizer no\.model: No such file"),
    "no model": (no_model, r"x\.model is not a SentencePiece model"),
    "option taken for a model": (
        lambda _: ["--tokenizer", "seed=1"],
        r"the tokenizer seed=1 does not exist; .* before --tokenizer",
    ),
    "no such type": (
        lambda _: ["--types", "unigram,wordpiece"],
        r"--types wordpiece is not .* some of unigram,bpe,char",
    ),
    "idle type": (lambda _: ["--steps", "0", "tokenizer_type=bpe"], r"tokenizer_type has no effect .*; give --types"),
    "idle variants": (lambda _: ["--steps", "0", "subword.variants=1"], r"subword has no effect on .*; remove it"),
    "no validation": (lambda _: ["--steps", "9", "val_fraction=0"], r"val_fraction=0 leaves no text .*--steps 0"),
    "misspelt option": (lambda _: ["--steps", "0", "vocabsize=9"], r"'vocabsize'; did you mean 'vocab_size'\?"),
    "vocabulary too large": (lambda _: ["--steps", "0", "vocab_size=9999"], r"vocab_size=9999 is more pieces"),
    "too little to train on": (
        lambda _: ["--types", "char", "val_fraction=0.3", "vocab_size=300"],
        r"the small model could not be trained with char: .*tokens.*; give --steps 0 to skip this",
    ),
}


TRAINS = {"too little to train on": pytest.mark.process}  # all others are refused before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(*case, id=name, marks=TRAINS.get(name, ())) for name, case in MISTAKES.items()],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: Callable[[Path], list[str | Path]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_texts(tmp_path / "in", 6, n_words=4)
    assert run("compare-tokenizers", "--input", tmp_path / "in", *arguments(tmp_path)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("error: ") == shown.err.count("\n") == 1
    assert re.search(message, shown.err), shown.err


# --- tokenizers that lose text ----------------------------------------------------------------------------------


def test_a_tokenizer_that_loses_text_does_not_come_first(tmp_path: Path, char_model: Path, capsys) -> None:
    (tmp_path / "lossy.model").write_bytes(lossy_tokenizer("word").model_bytes)
    [text] = write(tmp_path, a="the cat \u4f60\u597d\n")  # 15 bytes; " \u4f60\u597d" and the newline are lost
    models = ("--tokenizer", tmp_path / "lossy.model", char_model)
    assert run("compare-tokenizers", "--input", text, *models, "--steps", "0") == 0
    _, first, second, note = capsys.readouterr().out.splitlines()
    assert first.split()[0] == str(char_model)
    assert second.split()[0] == str(tmp_path / "lossy.model")
    assert (first.split()[6], second.split()[6]) == ("0.000%", f"{8 / 15:.3%}")
    assert note == "lost: share of the text's bytes that the tokens do not decode to"


def test_bytes_that_are_lost_count_as_8_bits_each(
    tmp_path: Path, char_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them, a model of nothing but unknown tokens has more bits per byte than one that says what it reads."""
    (tmp_path / "lossy.model").write_bytes(lossy_tokenizer("word").model_bytes)
    write_texts(tmp_path / "in", 40)
    (tmp_path / "in" / "other.txt").write_text("\u4f60" * 2000, encoding="utf-8")
    known = {str(tmp_path / "lossy.model"): 0.01, str(char_model): 2.5}  # what training would find
    monkeypatch.setattr(data_tools.compare_tokenizers, "_bits_per_byte", lambda name, *_: known[name])
    options = BuildConfig(val_fraction=0.2)
    best, worst = compare_tokenizers([str(tmp_path / "in")], options, models=[*map(Path, known)], kinds=(), steps=1)
    assert (best["tokenizer"], best["bits_per_byte"], best["lost_share"]) == (str(char_model), 2.5, 0.0)
    assert worst["lost_share"] > 0.3
    assert worst["bits_per_byte"] == 0.01 + 8 * worst["lost_share"]
