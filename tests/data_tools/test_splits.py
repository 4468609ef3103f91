"""Splits: few long documents are cut by position, given splits are kept apart, and no text is in two of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_support import document, documents_of, run, shard_bytes, small_tokenizer, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import to_jsonable_python

import data_tools.executor.workers
import data_tools.readers.document_pieces
import data_tools.readers.plain_text
import data_tools.readers.work_units
import data_tools.stages.cut_documents
import data_tools.stages.pipeline
from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.readers.split_names import split_in_names
from data_tools.stages.cut_documents import find_ends
from data_tools.stages.select import SplitConfig, UnitInput, cut_pieces
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import read_manifest
from megagpt.data.provenance import origins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


def paragraphs(n: int, seed: int = 0) -> str:
    return "\n\n".join(document(seed + i, 40).strip() for i in range(n)) + "\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return text


# --- few documents --------------------------------------------------------------------------------------------


def test_one_text_file_is_cut_after_a_paragraph_and_its_last_part_is_held_out(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write(tmp_path / "input.txt", paragraphs(60))
    out = tmp_path / "out"
    given = ["--input", tmp_path / "input.txt", "--out", out]
    assert run("build", *given, f"tokenizer={model}", "val_fraction=0.1", "test_fraction=0.1") == 0
    assert "too few documents for val_fraction=0.1 and test_fraction=0.1: 1 cut" in capsys.readouterr().out
    [train], [val], [test] = documents_of(out).values()
    assert train + val + test == text
    assert train.endswith("\n\n")
    assert val.endswith("\n\n")
    assert len(val) == pytest.approx(0.1 * len(text), rel=0.5)
    assert len(test) == pytest.approx(0.1 * len(text), rel=0.5)
    assert read_manifest(out).cut_documents == 1
    [origin] = origins(open_dataset(out), "val", [0])
    assert origin.file == str(tmp_path / "input.txt")
    assert run("verify", out) == 0


@pytest.mark.parametrize("val_fraction", [0.01, 0.1])
def test_three_files_give_each_split_its_share_and_no_text_twice(
    val_fraction: float, tmp_path: Path, model: Path
) -> None:
    texts = [write(tmp_path / "in" / f"{i}.txt", paragraphs(80, 1000 * i)) for i in range(3)]
    report = build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=val_fraction))
    splits = documents_of(tmp_path / "out")
    share = report["splits"]["val"]["bytes"] / report["bytes"]
    assert share == pytest.approx(val_fraction, rel=0.5)
    assert report["bytes"] == sum(len(text.encode()) for text in texts)
    for text in texts:
        [start] = [part for part in splits["train"] if text.startswith(part)]
        assert start == text or text.removeprefix(start) in splits["val"]


def test_short_documents_stay_whole_next_to_a_long_one(tmp_path: Path, model: Path) -> None:
    long = write(tmp_path / "in" / "long.txt", paragraphs(300))
    write_texts(tmp_path / "in" / "short", 5, n_words=20)
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0.05))
    splits = documents_of(tmp_path / "out")
    short = {document(i, 20) for i in range(5)}
    parts = {split: [text for text in texts if text not in short] for split, texts in splits.items()}
    assert "".join(parts["train"] + parts["val"]) == long
    assert sum(map(len, splits.values())) == 5 + 2


def test_enough_documents_stay_whole(tmp_path: Path, model: Path) -> None:
    texts = write_texts(tmp_path / "in", 60)
    report = build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0.2))
    assert sorted(text for own in documents_of(tmp_path / "out").values() for text in own) == sorted(texts)
    assert report["notes"] == []
    assert "cut_documents" not in json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_new_options_leave_no_trace_in_a_dataset_that_does_not_use_them() -> None:
    """Otherwise today's builds would get other bytes, and a killed one would begin again."""
    config = BuildConfig()
    [source] = config.pipeline(config.with_inputs(["x"]))["sources"]
    assert not {"split", "splits"} & source.keys()
    splits = SplitConfig(val_fraction=0.1, test_fraction=0.0, duplicates="remove", seed=1)
    unit = UnitInput(number=0, source=0, files=(0,), texts="extract/x", contamination=None)
    assert to_jsonable_python([splits, unit]) == [
        {"val_fraction": 0.1, "test_fraction": 0.0, "duplicates": "remove", "seed": 1},
        {"number": 0, "source": 0, "files": [0], "texts": "extract/x", "contamination": None},
    ]


@pytest.mark.parametrize("method", ["none", "exact", "near"])
def test_no_part_is_dropped_as_a_copy_of_another(method: str, tmp_path: Path, model: Path) -> None:
    """The last half of the file is its first half again."""
    half = paragraphs(40)
    write(tmp_path / "input.txt", half + half)
    options = BuildConfig(tokenizer=model, val_fraction=0.5, dedup={"method": method})
    report = build([tmp_path / "input.txt"], tmp_path / "out", options)
    assert report["dropped"] == {}
    assert report["bytes"] == 2 * len(half)


def test_copies_that_are_kept_are_not_cut(tmp_path: Path, model: Path) -> None:
    """Cut at the same share, a copy with a longer start has in its first part what the other has in its last."""
    text = paragraphs(60)
    write(tmp_path / "in" / "a.txt", text)
    write(tmp_path / "in" / "b.txt", paragraphs(2, 500) + text)
    dedup = {"method": "near", "duplicates": "keep", "bands": 40, "rows": 3}
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0.1, dedup=dedup, seed=3))
    [texts] = documents_of(tmp_path / "out").values()
    assert len(texts) == 2


@pytest.mark.process
def test_any_number_of_workers_and_units_cuts_at_the_same_place(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write(tmp_path / "in" / f"{i}.txt", paragraphs(40, 1000 * i))
    options: dict[str, Any] = {"tokenizer": model, "val_fraction": 0.1}
    build([tmp_path / "in"], tmp_path / "whole", BuildConfig(workers=1, **options))
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 2000)
    build([tmp_path / "in"], tmp_path / "one", BuildConfig(workers=1, **options))
    monkeypatch.setattr(data_tools.executor.workers, "SMALL_BYTES", 0)
    build([tmp_path / "in"], tmp_path / "two", BuildConfig(workers=2, **options))
    assert documents_of(tmp_path / "whole") == documents_of(tmp_path / "one")
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")


def test_a_cut_may_fall_within_any_piece(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "input.txt", paragraphs(60))
    for module in (data_tools.readers.document_pieces, data_tools.readers.plain_text):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 64)
    options = BuildConfig(tokenizer=model, val_fraction=0.2, test_fraction=0.3)
    build([tmp_path / "input.txt"], tmp_path / "out", options)
    [train], [val], [test] = documents_of(tmp_path / "out").values()
    assert train + val + test == text


def test_a_build_interrupted_after_cutting_resumes_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "input.txt", paragraphs(60))
    options = BuildConfig(tokenizer=model, val_fraction=0.2)
    build([tmp_path / "input.txt"], tmp_path / "undisturbed", options)
    with monkeypatch.context() as patched:
        patched.setattr(data_tools.stages.pipeline, "tokenize_and_shuffle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build([tmp_path / "input.txt"], tmp_path / "resumed", options)
    monkeypatch.setattr(data_tools.stages.cut_documents, "find_ends", interrupted)  # which is not done again
    build([tmp_path / "input.txt"], tmp_path / "resumed", options)
    assert shard_bytes(tmp_path / "resumed") == shard_bytes(tmp_path / "undisturbed")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\r\t\u00e9\u6f22\U0001f600"), min_size=1, max_size=300),
    share=st.floats(0.01, 0.99),
    n=st.integers(1, 50),
)
def test_parts_are_the_document_however_it_is_read(text: str, share: float, n: int) -> None:
    pieces = [text[at : at + n] for at in range(0, len(text), n)]
    size = len(text.encode())
    ends = find_ends(pieces, size, [share, (1 - share) / 2, (1 - share) / 2])
    assert ends == find_ends([text], size, [share, (1 - share) / 2, (1 - share) / 2])
    assert ends == sorted(ends)
    assert ends[-1] == size
    parts = ["", "", ""]
    for part, piece in cut_pieces(pieces, ends):
        parts[part] += piece
    assert "".join(parts) == text


@pytest.mark.parametrize(("fraction", "splits"), [("val_fraction=0", {"train"}), ("val_fraction=1", {"val"})])
def test_a_fraction_of_0_or_1_means_that(
    fraction: str, splits: set[str], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "input.txt", paragraphs(20))
    out = tmp_path / "out"
    assert run("build", "--input", tmp_path / "input.txt", "--out", out, f"tokenizer={model}", fraction) == 0
    assert "empty" not in capsys.readouterr().out
    assert documents_of(out).keys() == splits
    assert run("verify", out) == 0


# --- given splits ---------------------------------------------------------------------------------------------


def trio(folder: Path) -> dict[str, str]:
    names = {"train": "wiki.train.tokens", "val": "wiki.valid.tokens", "test": "wiki.test.tokens"}
    return {split: write(folder / name, paragraphs(20, 100 * i)) for i, (split, name) in enumerate(names.items())}


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
        write(path.with_name("state.json"), json.dumps({"_data_files": [{"filename": path.name}]}))
        write(path.with_name("dataset_info.json"), json.dumps({"features": {"text": {"dtype": "string"}}}))
    write(tmp_path / "in" / "dataset_dict.json", json.dumps({"splits": list(texts)}))
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


def test_a_held_out_file_within_the_input_is_not_trained_on(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.txt", document(0))
    held_out = write(tmp_path / "in" / "b.txt", document(1))
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model), val=[tmp_path / "in" / "b.txt"])
    assert documents_of(tmp_path / "out") == {"train": [document(0)], "val": [held_out]}


def test_decontamination_spares_the_held_out_documents_that_are_given(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "eval.txt", document(0))
    rows = [document(0) + " and more", document(1), document(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    options = BuildConfig(tokenizer=model, decontamination={"files": [str(tmp_path / "eval.txt")]}, val_fraction=0)
    build([tmp_path / "train.jsonl"], tmp_path / "out", options, test=[tmp_path / "eval.txt"])
    splits = documents_of(tmp_path / "out")
    assert splits == {"train": splits["train"], "test": [document(0)]}
    assert sorted(splits["train"]) == sorted(rows[1:])


def test_a_split_that_no_name_tells_is_a_fraction_of_the_training_files(tmp_path: Path, model: Path) -> None:
    train = write(tmp_path / "in" / "train.txt", paragraphs(60))
    test = write(tmp_path / "in" / "test.txt", paragraphs(9, 300))
    options = BuildConfig(tokenizer=model, splits="by-name", val_fraction=0.1)
    build([tmp_path / "in"], tmp_path / "out", options)
    splits = documents_of(tmp_path / "out")
    assert splits["test"] == [test]
    assert "".join(splits["train"] + splits["val"]) == train


def test_held_out_text_trains_no_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "ab " * 4000)
    write(tmp_path / "valid.txt", "xyz " * 4000)
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
            write(folder / name, document(i))

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
