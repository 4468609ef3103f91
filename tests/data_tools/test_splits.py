"""Given splits are kept apart, by option or by the names of files, and no text is in two of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_support import document, documents_of, paragraphs, run, small_tokenizer, write_text, write_texts

from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.readers.split_names import split_in_names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


def trio(folder: Path) -> dict[str, str]:
    names = {"train": "wiki.train.tokens", "val": "wiki.valid.tokens", "test": "wiki.test.tokens"}
    return {split: write_text(folder / name, paragraphs(20, 100 * i)) for i, (split, name) in enumerate(names.items())}


@pytest.mark.parametrize("how", ["flags", "by name", "sources"])
def test_given_splits_are_kept_apart(how: str, tmp_path: Path, model: Path) -> None:
    texts = trio(tmp_path / "in")
    paths = {
        split: tmp_path / "in" / f"wiki.{name}.tokens"
        for split, name in zip(texts, ("train", "valid", "test"), strict=True)
    }
    out = tmp_path / "out"
    sources = {split: {"paths": str(path), "split": split} for split, path in paths.items()}
    given: list[str | Path] = {
        "flags": ["--input", paths["train"], "--val", paths["val"], "--test", paths["test"], "--out", out],
        "by name": ["--input", tmp_path / "in", "--out", out, "splits=by-name"],
        "sources": ["--out", out, f"sources={json.dumps(sources)}"],
    }[how]
    assert run("build", *given, f"tokenizer={model}") == 0
    assert documents_of(out) == {split: [text] for split, text in texts.items()}


def test_a_dataset_dict_is_split_by_the_names_of_its_folders(tmp_path: Path, model: Path) -> None:
    texts = {"train": document(0), "validation": document(1), "test": document(2)}
    for split, text in texts.items():
        path = tmp_path / "in" / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        table = pa.table({"text": [text]})
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        write_text(path.with_name("state.json"), json.dumps({"_data_files": [{"filename": path.name}]}))
        write_text(path.with_name("dataset_info.json"), json.dumps({"features": {"text": {"dtype": "string"}}}))
    write_text(tmp_path / "in" / "dataset_dict.json", json.dumps({"splits": list(texts)}))
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, splits="by-name"))
    assert documents_of(tmp_path / "out") == {
        split: [text] for split, text in zip(("train", "val", "test"), texts.values(), strict=True)
    }


def test_names_that_look_like_splits_are_warned_of_with_the_option_that_uses_them(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trio(tmp_path / "in")
    assert run("build", "--input", tmp_path / "in", "--out", tmp_path / "out", f"tokenizer={model}") == 0
    warning = capsys.readouterr().err
    assert f"{tmp_path / 'in' / 'wiki.valid.tokens'} (val)" in warning
    assert "add splits=by-name" in warning
    files = [tmp_path / "in" / f"wiki.{name}.tokens" for name in ("train", "valid", "test")]
    assert run("build", "--input", *files, "--out", tmp_path / "out2", f"tokenizer={model}", "val_fraction=0.1") == 0
    assert "add splits=by-name" in capsys.readouterr().err
    write_texts(tmp_path / "texts", 4)
    assert run("build", "--input", tmp_path / "texts", "--out", tmp_path / "out3", f"tokenizer={model}") == 0
    assert "by-name" not in capsys.readouterr().err


def test_a_share_far_from_the_one_that_was_asked_for_is_told_with_ways_out(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole documents are held out by their hashes, and of 20 these are 1 to 4; the ways out work as typed."""
    for i in range(20):
        write_text(tmp_path / "in" / f"{i:02}.txt", paragraphs(3, 1000 * i))
    command = ["build", f"tokenizer={model}", "--input", tmp_path / "in"]
    assert run(*command, "--out", tmp_path / "many", "val_fraction=0.1", "seed=5") == 0
    told = capsys.readouterr().out
    assert (
        "  val has 20.31% of the text, where val_fraction=0.1 asks for 10.00%: short documents are held out whole"
        in told
    )
    assert "choose files by --val FILE instead of val_fraction, or draw other documents by seed=6\n" in told
    for seed in ("seed=1", "seed=2"):
        assert run(*command, "--out", tmp_path / seed, "val_fraction=0.1", seed) == 0
        assert ("val has 4.77% of the text" in capsys.readouterr().out) == (seed == "seed=1")
    assert run(*command, "--val", tmp_path / "in" / "03.txt", "--out", tmp_path / "given") == 0
    assert "asks for" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "dedup", [{}, {"method": "none"}, {"duplicates": "keep"}, {"method": "near", "bands": 40, "rows": 3}]
)
def test_the_training_copy_of_a_held_out_document_goes(dedup: dict[str, Any], tmp_path: Path, model: Path) -> None:
    shared = [document(i, 200) for i in range(3)]
    own = [document(100 + i, 200) for i in range(9)]
    near = [text + " more" for text in shared] if dedup.get("method") == "near" else shared
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in near + own))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in shared[:2]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in shared[1:]))
    options = BuildConfig(tokenizer=model, dedup=dedup)
    held_out = {"val": [tmp_path / "val.jsonl"], "test": [tmp_path / "test.jsonl"]}
    build([tmp_path / "train.jsonl"], tmp_path / "out", options, **held_out)
    splits = {split: sorted(texts) for split, texts in documents_of(tmp_path / "out").items()}
    assert splits == {"train": sorted(own), "val": shared[:1], "test": sorted(shared[1:])}


def test_a_build_without_validation_tells_so_unless_it_is_asked_for(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "a.txt", paragraphs(20))
    write_text(tmp_path / "b.txt", paragraphs(20, 100))
    sources = json.dumps({"a": {"paths": str(tmp_path / "a.txt"), "split": "train"}})
    command = ("build", f"sources={sources}", f"tokenizer={model}", "--out")
    assert run(*command, tmp_path / "out") == 0
    assert "the validation split is empty: every input has a split of its own" in capsys.readouterr().out
    assert run(*command, tmp_path / "wanted", "val_fraction=0") == 0
    assert "empty" not in capsys.readouterr().out
    # the way out, as typed
    assert run(*command, tmp_path / "other", "--val", tmp_path / "b.txt") == 0
    assert "empty" not in capsys.readouterr().out


def test_a_held_out_file_within_the_input_is_not_trained_on(tmp_path: Path, model: Path) -> None:
    write_text(tmp_path / "in" / "a.txt", document(0))
    held_out = write_text(tmp_path / "in" / "b.txt", document(1))
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model), val=[tmp_path / "in" / "b.txt"])
    assert documents_of(tmp_path / "out") == {"train": [document(0)], "val": [held_out]}


def test_decontamination_spares_the_held_out_documents_that_are_given(tmp_path: Path, model: Path) -> None:
    write_text(tmp_path / "eval.txt", document(0))
    rows = [document(0) + " and more", document(1), document(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    options = BuildConfig(tokenizer=model, decontamination={"files": [str(tmp_path / "eval.txt")]}, val_fraction=0)
    build([tmp_path / "train.jsonl"], tmp_path / "out", options, test=[tmp_path / "eval.txt"])
    splits = documents_of(tmp_path / "out")
    assert splits == {"train": splits["train"], "test": [document(0)]}
    assert sorted(splits["train"]) == sorted(rows[1:])


def test_a_split_that_no_name_tells_is_a_fraction_of_the_training_files(tmp_path: Path, model: Path) -> None:
    train = write_text(tmp_path / "in" / "train.txt", paragraphs(60))
    test = write_text(tmp_path / "in" / "test.txt", paragraphs(9, 300))
    options = BuildConfig(tokenizer=model, splits="by-name", val_fraction=0.1)
    build([tmp_path / "in"], tmp_path / "out", options)
    splits = documents_of(tmp_path / "out")
    assert splits["test"] == [test]
    assert "".join(splits["train"] + splits["val"]) == train


def test_held_out_text_trains_no_tokenizer(tmp_path: Path) -> None:
    write_text(tmp_path / "train.txt", "ab " * 4000)
    write_text(tmp_path / "valid.txt", "xyz " * 4000)
    options = ["splits=by-name", "vocab_size=267", "tokenizer_type=bpe"]
    assert run("train-tokenizer", "--input", tmp_path, "--out", tmp_path / "new.model", *options) == 0
    assert b"xy" not in (tmp_path / "new.model").read_bytes()
    assert b"ab" in (tmp_path / "new.model").read_bytes()


@pytest.mark.parametrize(
    ("path", "given", "split"),
    [
        ("/d/wiki.valid.tokens", "/d", "val"),
        ("/d/data/train-00000-of-00005.parquet", "/d", "train"),
        ("/d/validation/data-00000-of-00001.arrow", "/d", "val"),
        ("/d/train/test_driver.py", "/d", "train"),  # the folder decides
        ("/d/test/a/b.txt", "/d", "test"),
        ("/d/test/train.txt", "/d/test", "train"),  # but not the folder that the user gave
        ("/test/corpus/a.txt", "/test/corpus", None),  # nor what is above it
        ("/d/valid/a.txt", "/d/*/a.txt", "val"),
        ("/d/dev/part.txt", "/d/dev/part.txt", "val"),
        ("/d/pretraining.txt", "/d", None),
        ("/d/eval.jsonl", "/d", "test"),
        ("/d/evaluation/part.txt", "/d", "test"),
        ("/d/eval/val.jsonl", "/d", "val"),  # the other words come first
        ("s3://b/c/DEV.jsonl.zst", "s3://b/c", "val"),
    ],
)
def test_names_tell_splits(path: str, given: str, split: str | None) -> None:
    assert split_in_names(path, [given]) == split


def with_files(*names: str) -> Any:
    def write_all(folder: Path) -> None:
        for i, name in enumerate(names):
            write_text(folder / name, document(i))

    return write_all


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        (["in/train.txt", "in/vocab.txt"], ["--input", "in", "splits=by-name"], "in/vocab.txt tells a split"),
        (["in/train.txt", "in/train-test.txt"], ["--input", "in", "splits=by-name"], "'train-test.txt' names several"),
        (["a.txt", "b.txt"], ["--input", "a.txt", "--val", "b.txt", "val_fraction=0.1"], "set val_fraction=0"),
        (["a.txt"], ["--input", "a.txt", "--val", "c.txt"], "c.txt: there is no such file"),
        (["a.txt"], ["--input", "a.txt", "--val", "0.1"], "set val_fraction=0.1"),
        (["a.txt"], ["--val", "a.txt"], "give tokenizer=MODEL"),
        (["a.txt"], ["--input", "a.txt", "val_fraction=1"], "give tokenizer=MODEL"),
        (["a.txt"], ["--input", "a.txt", "val_fraction=0.9", "test_fraction=0.2"], "set test_fraction=0.1 or less"),
        (["a.txt"], ["--input", "a.txt", "splits=names"], "'by-hash' or 'by-name'"),
        (["a.txt"], ["--input", "a.txt", "split=val"], "did you mean 'splits'"),
    ],
)
def test_a_mistake_about_splits_is_one_message(
    files: list[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with_files(*files)(tmp_path)
    options = [argument for argument in arguments if "=" in argument]
    assert run("build", "--out", "out", *options, *(a for a in arguments if "=" not in a)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
