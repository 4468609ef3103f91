"""A file that cannot be read costs its own text: it is counted, named, and told by the exit code; strict refuses it."""

import gzip
import io
import json
import random
from collections.abc import Callable
from errno import ECONNRESET, EIO, EMFILE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_support import all_documents, run
from reader_support import arrow, csv, json_array, jsonl, parquet

from data_tools.executor.tasks import Done
from data_tools.readers.input_file import InputFile, UnreadableFile
from data_tools.readers.open_file import open_arrow, open_parquet, reading
from data_tools.stages.extract import unreadable_files
from megagpt.errors import UserError

GOOD = [f"good document {i}" for i in range(9)]
OPTIONS = ("tokenizer_type=char", "val_fraction=0", "workers=1")
LETTERS = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=90_000))
RANDOM = [LETTERS[i : i + 1000] for i in range(0, len(LETTERS), 1000)]


def without_its_end() -> bytes:
    return gzip.compress(jsonl(RANDOM))[:-9]


def with_a_flipped_byte() -> bytes:
    content = bytearray(parquet(RANDOM))
    content[len(content) // 2 : len(content) // 2 + 1000] = b"\xff" * 1000
    return bytes(content)


DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut.jsonl.gz": without_its_end,
    "flipped.parquet": with_a_flipped_byte,
    "late.csv": lambda: csv(RANDOM * 15)[:-3],
    "late.json": lambda: json_array(RANDOM * 15)[:-3],
    "other_field.jsonl": lambda: b'{"content": "x"}\n',
    "not.arrow": lambda: b"hello",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unreadable_file_in_a_folder_is_counted_named_and_told_by_the_exit_code(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(jsonl(GOOD))
    (folder / name).write_bytes(DAMAGED[name]())
    command = ("build", "--input", folder, "--out", tmp_path / "out", *OPTIONS)
    assert run(*command, "strict=true") == 2
    assert name in capsys.readouterr().err
    assert run(*command) == 3
    assert "1 file could not be read, or not to the end" in (out := capsys.readouterr().out)
    assert f"{folder / name}" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["unreadable"]) == [str(folder / name)]
    assert f"{folder / name}" in (tmp_path / "out" / "report.html").read_text()
    documents = all_documents(tmp_path / "out")
    assert set(GOOD) <= set(documents) <= {*GOOD, *RANDOM}


def test_the_only_file_is_refused_when_it_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(without_its_end())
    for command in ("build", "train-tokenizer"):
        assert run(command, "--input", tmp_path / "a.jsonl.gz", "--out", tmp_path / command, *OPTIONS[::2]) == 2
        assert f"error: cannot read {tmp_path / 'a.jsonl.gz'}" in capsys.readouterr().err


def test_commands_without_a_report_refuse_an_unreadable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(without_its_end())
    (tmp_path / "good.jsonl").write_bytes(jsonl(GOOD))
    assert run("train-tokenizer", "--input", tmp_path, "--out", tmp_path / "a.model", "vocab_size=300") == 2
    assert f"error: cannot read {tmp_path / 'cut.jsonl.gz'}" in capsys.readouterr().err
    assert not (tmp_path / "a.model").exists()
    assert run("compare-tokenizers", "--input", tmp_path, "--types", "char", "--steps", "0", "vocab_size=300") == 2
    assert f"error: cannot read {tmp_path / 'cut.jsonl.gz'}" in capsys.readouterr().err


def test_a_document_that_cannot_be_read_to_its_end_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    (folder / "long.txt.gz").write_bytes(gzip.compress((LETTERS * 20).encode())[:-9])
    assert run("build", "--input", folder, "--out", tmp_path / "out", *OPTIONS) == 3
    assert all_documents(tmp_path / "out") == ["good"]


@pytest.mark.parametrize("named", [True, False])
def test_what_the_first_record_shows_is_told_before_any_work_starts(
    named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(b'{"content": "x"}\n')
    (folder / "good.jsonl").write_bytes(jsonl(GOOD))
    inputs = sorted(folder.iterdir()) if named else [folder]
    assert run("build", "--input", *inputs, "--out", tmp_path / "out", "strict=true", *OPTIONS) == 2
    assert "0.jsonl:1 has no field 'text'; it has content; set text_field=content" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("build", "--input", *inputs, "--out", tmp_path / "out", *OPTIONS) == (2 if named else 3)
    said = capsys.readouterr().err
    assert named or said.startswith("warning: 3 of the first 4 files of in cannot be read, and will be left out")
    assert (tmp_path / "out").exists() != named


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
ENDINGS = ["txt", "bin", "parquet", "arrow", "jsonl", "jsonl.gz", "txt.zst", "csv", "tsv", "json", "html", "warc", "py"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_git_lfs_pointer_is_named_and_never_trained_on(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a clone"
    folder.mkdir()
    (folder / f"a.{ending}").write_bytes(POINTER)
    message = f"a.{ending} is a Git LFS pointer, not the file itself; fetch the files with: git -C '{folder}' lfs pull"
    for path in (folder, folder / f"a.{ending}"):
        assert run("build", "--input", path, "--out", tmp_path / "out", *OPTIONS) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (folder / "good.jsonl").write_bytes(jsonl(GOOD))
    assert run("build", "--input", folder, "--out", tmp_path / "out", *OPTIONS) == 3
    assert message in capsys.readouterr().out
    assert all_documents(tmp_path / "out") == GOOD


@pytest.mark.parametrize("name", ["test.txt", "test.jsonl", "test.jsonl.gz"])
def test_a_git_lfs_pointer_is_no_test_set(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jsonl").write_bytes(jsonl(GOOD))
    (tmp_path / name).write_bytes(POINTER)
    command = ("build", "--input", tmp_path / "good.jsonl", "--out", tmp_path / "out", *OPTIONS)
    assert run(*command, f"decontamination.files={tmp_path / name}") == 2
    assert f"{name} is a Git LFS pointer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pointer_of_git_annex_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("/annex/objects/SHA256E-s12345--4d7a2146.csv\n")
    assert run("build", "--input", tmp_path / "a.csv", "--out", tmp_path / "out", *OPTIONS) == 2
    assert f"fetch the files with: git -C {tmp_path} annex get ." in capsys.readouterr().err


MAY_PASS = [
    TimeoutError("slow"),
    ConnectionResetError(),
    ConnectionResetError(ECONNRESET, "Connection reset by peer"),
    OSError(EMFILE, "too many open files"),
    OSError(EIO, "Reduce your request rate"),
]


@pytest.mark.parametrize("error", MAY_PASS)
def test_what_may_pass_ends_the_build_and_costs_no_file(error: OSError) -> None:
    with pytest.raises(UserError) as raised, reading("s3://bucket/a.txt"):
        raise error
    assert not isinstance(raised.value, UnreadableFile)


class _Failing(io.BytesIO):
    """A file of an object store that is found and opened, and fails when it is read."""

    def __init__(self, error: OSError) -> None:
        super().__init__(bytes(5000))
        self._error = error

    def readinto(self, _: object) -> int:
        raise self._error


@pytest.mark.parametrize("open_", [open_parquet, open_arrow])
@pytest.mark.parametrize("error", MAY_PASS)
def test_a_network_that_fails_while_a_table_is_opened_costs_no_file(
    error: OSError, open_: Callable[[InputFile], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SimpleNamespace(open=lambda *_, **__: _Failing(error))
    monkeypatch.setattr("data_tools.readers.open_file.open_file_system", lambda _: (store, "bucket/a"))
    file = InputFile("s3://bucket/a", "parquet", "", 5000, state="", named=False, encoding="auto")
    with pytest.raises(UserError, match=r"cannot read s3://bucket/a|too many open files") as raised, open_(file):
        pass
    assert not isinstance(raised.value, UnreadableFile)


def test_the_work_of_an_older_version_is_not_done_again() -> None:
    assert unreadable_files([Done(Path("extract/x"), {"skipped": {}}), Done(Path("extract/y"), {"skipped": {}})]) == {}


@pytest.mark.parametrize("content", [jsonl, arrow])
def test_a_small_file_is_no_pointer(content: Callable[[list[str]], bytes], tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl" if content is jsonl else "a.arrow")
    path.write_bytes(content(["version https://git-lfs.github.com/spec/v1"]))
    assert run("build", "--input", path, "--out", tmp_path / "out", *OPTIONS) == 0
