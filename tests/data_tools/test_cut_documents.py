"""Few long documents are cut by position, so that each split gets its share, and no text is in two of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_support import (
    document,
    documents_of,
    paragraphs,
    run,
    shard_bytes,
    small_tokenizer,
    write_text,
    write_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import to_jsonable_python

import data_tools.executor.workers
import data_tools.readers.document_pieces
import data_tools.readers.formats.plain_text
import data_tools.readers.work_units
import data_tools.stages.cut_documents
import data_tools.stages.pipeline
from data_tools.build import build
from data_tools.config import BuildConfig
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


def test_one_text_file_is_cut_after_a_paragraph_and_its_last_part_is_held_out(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "input.txt", paragraphs(60))
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
    texts = [write_text(tmp_path / "in" / f"{i}.txt", paragraphs(80, 1000 * i)) for i in range(3)]
    report = build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=val_fraction))
    splits = documents_of(tmp_path / "out")
    share = report["splits"]["val"]["bytes"] / report["bytes"]
    assert share == pytest.approx(val_fraction, rel=0.5)
    assert report["bytes"] == sum(len(text.encode()) for text in texts)
    for text in texts:
        [start] = [part for part in splits["train"] if text.startswith(part)]
        assert start == text or text.removeprefix(start) in splits["val"]


def test_documents_of_given_splits_do_not_count(tmp_path: Path, model: Path) -> None:
    text = write_text(tmp_path / "one.txt", paragraphs(60))
    rows = [{"text": document(1000 + i, 20)} for i in range(300)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = BuildConfig(tokenizer=model, test_fraction=0.1)
    report = build([tmp_path / "one.txt"], tmp_path / "out", options, val=[tmp_path / "val.jsonl"])
    splits = documents_of(tmp_path / "out")
    assert "".join(splits["train"] + splits["test"]) == text
    assert report["splits"]["test"]["bytes"] == pytest.approx(0.1 * len(text), rel=0.5)
    assert len(splits["val"]) == 300


def test_contaminated_documents_do_not_count(tmp_path: Path, model: Path) -> None:
    text = write_text(tmp_path / "in" / "one.txt", paragraphs(60))
    rows = "".join(json.dumps({"text": document(1000 + i, 20)}) + "\n" for i in range(120))
    for name in ("in/bad.jsonl", "benchmark.jsonl"):
        (tmp_path / name).write_text(rows)
    decontamination = {"files": [str(tmp_path / "benchmark.jsonl")], "ngram": 8}
    options = BuildConfig(tokenizer=model, val_fraction=0.1, decontamination=decontamination)
    build([tmp_path / "in"], tmp_path / "out", options)
    [train], [val] = documents_of(tmp_path / "out").values()
    assert train + val == text


def test_short_documents_stay_whole_next_to_a_long_one(tmp_path: Path, model: Path) -> None:
    long = write_text(tmp_path / "in" / "long.txt", paragraphs(300))
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
    write_text(tmp_path / "input.txt", half + half)
    options = BuildConfig(tokenizer=model, val_fraction=0.5, dedup={"method": method})
    report = build([tmp_path / "input.txt"], tmp_path / "out", options)
    assert report["dropped"] == {}
    assert report["bytes"] == 2 * len(half)


def test_copies_that_are_kept_are_not_cut(tmp_path: Path, model: Path) -> None:
    """Cut at the same share, a copy with a longer start has in its first part what the other has in its last."""
    text = paragraphs(60)
    write_text(tmp_path / "in" / "a.txt", text)
    write_text(tmp_path / "in" / "b.txt", paragraphs(2, 500) + text)
    dedup = {"method": "near", "duplicates": "keep", "bands": 40, "rows": 3}
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0.1, dedup=dedup, seed=3))
    [texts] = documents_of(tmp_path / "out").values()
    assert len(texts) == 2


@pytest.mark.process
def test_any_number_of_workers_and_units_cuts_at_the_same_place(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_text(tmp_path / "in" / f"{i}.txt", paragraphs(40, 1000 * i))
    options: dict[str, Any] = {"tokenizer": model, "val_fraction": 0.1}
    build([tmp_path / "in"], tmp_path / "whole", BuildConfig(workers=1, **options))
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 2000)
    build([tmp_path / "in"], tmp_path / "one", BuildConfig(workers=1, **options))
    monkeypatch.setattr(data_tools.executor.workers, "SMALL_BYTES", 0)
    build([tmp_path / "in"], tmp_path / "two", BuildConfig(workers=2, **options))
    assert documents_of(tmp_path / "whole") == documents_of(tmp_path / "one")
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")


def test_a_cut_may_fall_within_any_piece(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "input.txt", paragraphs(60))
    for module in (data_tools.readers.document_pieces, data_tools.readers.formats.plain_text):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 64)
    options = BuildConfig(tokenizer=model, val_fraction=0.2, test_fraction=0.3)
    build([tmp_path / "input.txt"], tmp_path / "out", options)
    [train], [val], [test] = documents_of(tmp_path / "out").values()
    assert train + val + test == text


def test_a_build_interrupted_after_cutting_resumes_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "input.txt", paragraphs(60))
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
    write_text(tmp_path / "input.txt", paragraphs(20))
    out = tmp_path / "out"
    assert run("build", "--input", tmp_path / "input.txt", "--out", out, f"tokenizer={model}", fraction) == 0
    assert "empty" not in capsys.readouterr().out
    assert documents_of(out).keys() == splits
    assert run("verify", out) == 0
