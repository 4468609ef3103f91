"""A mistake of the user gives one message that names it and the fix, and exit code 2."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import all_documents, run, small_tokenizer, write_texts

import data_tools.executor.dask_cluster
from data_tools.build import build
from data_tools.config import BuildConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


def bad_bytes(name: str, content: bytes) -> Callable[[Path], list[str | Path]]:
    def arguments(folder: Path) -> list[str | Path]:
        (folder / name).write_bytes(content)
        return ["--input", folder / name, "--out", folder / "out"]

    return arguments


def with_options(*options: str) -> Callable[[Path], list[str | Path]]:
    def arguments(folder: Path) -> list[str | Path]:
        write_texts(folder / "in", 5)
        return ["--input", folder / "in", "--out", folder / "out", *options]

    return arguments


def with_config(text: str) -> Callable[[Path], list[str | Path]]:
    def arguments(folder: Path) -> list[str | Path]:
        (folder / "build.json").write_text(text)
        return [*with_options()(folder), "--config", folder / "build.json"]

    return arguments


def other_column(folder: Path) -> list[str | Path]:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), folder / "a.parquet")
    return ["--input", folder / "a.parquet", "--out", folder / "out"]


def numbers_as_text(folder: Path) -> list[str | Path]:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")
    return ["--input", folder / "a.parquet", "--out", folder / "out"]


def misspelt_input(folder: Path) -> list[str | Path]:
    (folder / "my_texts").mkdir()
    return ["--input", f"{folder}/my_textz/", "--out", folder / "out"]


def out_is_finished(folder: Path) -> list[str | Path]:
    (folder / "out").mkdir()
    (folder / "out" / "manifest.json").write_text("{}")
    return with_options()(folder)


def out_is_something_else(folder: Path) -> list[str | Path]:
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "thesis.tex").write_text("years of work")
    return with_options()(folder)


def out_has_somebodys_build_folder(folder: Path) -> list[str | Path]:
    (folder / "out" / ".build").mkdir(parents=True)
    return out_is_something_else(folder)


def out_is_a_file(folder: Path) -> list[str | Path]:
    (folder / "out").write_text("")
    return with_options()(folder)


LINE = json.dumps({"text": "hello"}).encode() + b"\n"
BAD_INPUT = {
    "empty text": (bad_bytes("a.txt", b""), r"a\.txt is empty"),
    "empty JSON lines": (bad_bytes("a.jsonl", b""), r"a\.jsonl is empty"),
    "binary text": (bad_bytes("a.txt", b"hello\0"), r"a\.txt is binary \(a NUL byte at offset 5\)"),
    "latin-1 text": (bad_bytes("a.txt", b"caf\xe9"), r"a\.txt is not UTF-8 \(byte 0xe9 at offset 3\)"),
    "white space only": (
        bad_bytes("a.txt", b" \n"),
        r"no text to train a tokenizer on; skipped: 1 empty \(first: .*a\.txt",
    ),
    "other field": (
        bad_bytes("a.jsonl", b'{"content": "x", "id": 1}\n' + LINE),
        r"a\.jsonl:1 has no field 'text'; it has content, id; set text_field=content",
    ),
    "only bad lines": (bad_bytes("a.jsonl", b"{\n"), r"no text to train.*skipped: 1 bad JSON \(first: .*a\.jsonl:1\)"),
    "not gzip": (bad_bytes("a.jsonl.gz", b"hello"), r"cannot read .*a\.jsonl\.gz"),
    "cut gzip": (bad_bytes("a.jsonl.gz", gzip.compress(LINE * 99)[:-9]), r"cannot read .*a\.jsonl\.gz: .*[Tt]runcated"),
    "not Parquet": (bad_bytes("a.parquet", b"hello"), r"a\.parquet is not a Parquet file"),
    "other column": (other_column, r"a\.parquet has no column 'text'; it has content, url; set text_field=content"),
    "numbers as text": (numbers_as_text, r"a\.parquet: column 'text' is not text"),
    "no such input": (
        lambda folder: ["--input", folder / "no", "--out", folder / "out"],
        r"/no: there is no such file or folder",
    ),
    "misspelt input": (
        misspelt_input,
        r"/my_textz/?: there is no such file or folder; did you mean \S+/my_texts\?",
    ),
    "option taken for input": (
        lambda folder: ["--input", *with_options()(folder)[1:2], "seed=1", "--out", folder / "out"],
        r"seed=1: there is no such file .*; key=value options go after --out",
    ),
    "no file matches": (with_options("include=*.rs"), r"there are no files to read in .*\(with include=\*\.rs\)"),
    "misspelt key": (with_options("vocabsize=300"), r"unknown key 'vocabsize'; did you mean 'vocab_size'\?"),
    "unknown key": (
        with_options("xyzzy=1"),
        r"unknown key 'xyzzy'; known are chat_template, decontamination, dedup, encoding",
    ),
    "no number": (with_options("vocab_size=many"), r"vocab_size='many' is not a number"),
    "fraction too large": (with_options("val_fraction=0.6", "test_fraction=0.5"), r"are more than all"),
    "no equals sign": (with_options("strict"), r"options are key=value: write strict=true and not strict"),
    "idle option": (
        with_options("tokenizer=x.model", "vocab_size=9"),
        r"vocab_size has no effect with tokenizer=x\.model",
    ),
    "no such tokenizer": (with_options("tokenizer=no.model"), r"cannot read the tokenizer no\.model: No such file"),
    "vocabulary too large": (
        with_options("vocab_size=32000"),
        r"vocab_size=32000 is more pieces .* set vocab_size=\d+, the most",
    ),
    "vocabulary too small": (
        with_options("vocab_size=100"),
        r"vocab_size=100 is too small .* set vocab_size=\d+, the least",
    ),
    "config not JSON": (with_config("{"), r"build\.json, line 1, column 2: not JSON"),
    "config nested": (with_config("[" * 10**5), r"--config .*build\.json: its brackets are nested too deep"),
    "config misspelt": (with_config('{"val_fracton": 0.1}'), r"'val_fracton'; did you mean 'val_fraction'\?"),
    "finished": (out_is_finished, r"--out .*out holds a finished dataset; give another folder, or delete it"),
    "somebody's folder": (out_is_something_else, r"--out .*out holds files that are not an unfinished build"),
    "somebody's .build": (out_has_somebodys_build_folder, r"--out .*out holds files that are not an unfinished build"),
    "out is a file": (out_is_a_file, r"--out .*out is a file; give a folder"),
    "no scheduler": (
        with_options("--scheduler", "tcp://127.0.0.1:9"),
        r"no Dask scheduler answers at --scheduler tcp://127\.0\.0\.1:9",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: Callable[[Path], list[str | Path]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_tools.executor.dask_cluster, "CONNECT_SECONDS", 0.2)
    assert run("build", *arguments(tmp_path)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("error: ") == 1
    assert re.search(message, shown.err), shown.err
    assert (tmp_path / "out" / "thesis.tex").exists() == ("holds files" in message)


def test_the_vocabulary_that_the_message_names_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "in", 5)
    arguments = ("train-tokenizer", "--input", tmp_path / "in", "--out", tmp_path / "a.model")
    assert run(*arguments, "vocab_size=32000") == 2
    largest = capsys.readouterr().err.split("set vocab_size=")[1].split(",")[0]
    assert run(*arguments, f"vocab_size={largest}") == 0
    assert f"{int(largest):,} pieces" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name != "in"] == ["a.model"]


BROKEN_LINES = [
    b"{\n",
    b"[1]\n",
    b'{"id": 5}\n',
    b'{"text": null}\n',
    b'{"text": 5}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": ""}\n',
    b'{"text": "\xff"}\n',
]


def test_broken_lines_are_skipped_counted_and_the_first_is_named(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b"".join(BROKEN_LINES) + b"\n" + LINE.replace(b"hello", b"world"))
    report = build([path], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0))
    assert all_documents(tmp_path / "out") == ["hello", "world"]
    assert report["skipped"] == {
        "'text' is not a string": {"documents": 2, "first": f"{path}:5"},
        "bad JSON": {"documents": 1, "first": f"{path}:2"},
        "empty": {"documents": 1, "first": f"{path}:8"},
        "lone surrogate, which is not Unicode text": {"documents": 1, "first": f"{path}:7"},
        "no field 'text'": {"documents": 1, "first": f"{path}:4"},
        "not a JSON object": {"documents": 1, "first": f"{path}:3"},
        "not UTF-8": {"documents": 1, "first": f"{path}:9"},
    }


@pytest.mark.parametrize("line", BROKEN_LINES[:3])
def test_strict_stops_at_a_broken_line(
    line: bytes, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE + line)
    arguments = ("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert run("build", *arguments, f"tokenizer={model}", "strict=true") == 2
    assert "a.jsonl:2: " in capsys.readouterr().err


def test_nothing_readable_says_what_was_skipped(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 3)
    assert run("build", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", f"tokenizer={model}") == 2
    message = f"no document is left to train on; skipped: 3 bad JSON (first: {tmp_path / 'a.jsonl'}:1)"
    assert message in capsys.readouterr().err
