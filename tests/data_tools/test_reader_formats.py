"""Every format gives the same documents, and a file that cannot be read is refused by its name."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from reader_support import FORMATS, FRENCH, TEXTS, csv, json_array, jsonl, parquet, read_all, texts_of

import data_tools.readers.document_pieces
import data_tools.readers.formats.jsonl
import data_tools.readers.work_units
from data_tools.config import SourceConfig
from data_tools.readers.by_format import FORMATS as FORMATS_READ
from data_tools.readers.by_format import FileFormat
from data_tools.readers.document_pieces import DocumentPiece, Pieces
from data_tools.readers.input_file import FileSlice
from data_tools.readers.open_file import open_bytes, zstd
from megagpt.errors import UserError


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](TEXTS))
    assert texts_of(read_all(tmp_path / name)) == TEXTS
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 50)  # one unit for each slice
    monkeypatch.setattr(data_tools.readers.formats.jsonl, "BLOCK", 7)
    assert texts_of(read_all(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_positions_are_unique_within_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](TEXTS))
    positions = [item.position for item in read_all(tmp_path / name) if isinstance(item, DocumentPiece)]
    assert len(set(positions)) == len(TEXTS)
    assert positions == sorted(positions)


def test_a_new_format_is_one_row_and_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_lines(slice_: FileSlice, source: SourceConfig) -> Pieces:
        with open_bytes(slice_.file) as raw:
            for number, line in enumerate(raw):
                yield DocumentPiece(line.decode(), number)

    monkeypatch.setitem(FORMATS_READ, "lines", FileFormat((".lines",), read_lines, compressible=False))
    (tmp_path / "a.lines").write_text("one\ntwo\n")
    (tmp_path / "b.data").write_text("three\n")
    assert texts_of(read_all(tmp_path / "a.lines")) == ["one\n", "two\n"]
    assert texts_of(read_all(tmp_path / "b.data", format="lines")) == ["three\n"]
    (tmp_path / "a.lines.gz").write_bytes(gzip.compress(b"one\n"))
    with pytest.raises(UserError, match=r"a lines file is read in parts"):
        list(read_all(tmp_path / "a.lines.gz"))


def test_a_source_has_its_own_field_and_format(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert texts_of(read_all(tmp_path / "a.data", format="jsonl", text_field="body")) == ["one", "two"]


CUT_OFF = {
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts))[:-9],
    "a.jsonl.zst": lambda texts: zstd.compress(jsonl(texts))[:-9],
    "a.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts))[:-9],
    "a.jsonl.xz": lambda texts: lzma.compress(jsonl(texts))[:-9],
    "a.json": lambda texts: json_array(texts)[:-9],
    "without its end.json": lambda texts: json_array(texts)[:-1],
    "a.csv": lambda texts: csv(texts)[:-9],
    "within its header.csv": lambda texts: b'id,"text\n',
    "a.parquet": lambda texts: parquet(texts)[:-9],
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_file_that_was_cut_off_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CUT_OFF[name](TEXTS * 50))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        list(read_all(tmp_path / name))


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("rest", [b"garbage", b"\0\0garbage", b"\xfd7zXZ\0"])
def test_a_compressed_file_with_something_else_behind_it_is_refused(
    compress: Callable[[bytes], bytes], rest: bytes, tmp_path: Path
) -> None:
    ending = {gzip.compress: "gz", zstd.compress: "zst", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(compress(jsonl(TEXTS)) + rest)
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        list(read_all(tmp_path / f"a.jsonl.{ending}"))


def test_streams_of_xz_may_be_padded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl(TEXTS)) + bytes(8) + lzma.compress(b"") + bytes(4))
    assert texts_of(read_all(tmp_path / "a.jsonl.xz")) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,content\n1,x\n", r"a\.csv has no column 'text'; it has id, content; set text_field=content"),
        ("a.csv", b"id,Text\n1,x\n", r"it has id, Text; set text_field=Text"),
        ("a.csv", b"id,his words\n1,x\n", r"it has id, his words; set text_field=NAME, one of these"),
        ("a.jsonl", b'{"the text": "x"}\n', r"no field 'text'; it has the text; set 'text_field=the text'"),
        ("a.csv", b"id,text\n1,caf\xe9\n", r"a\.csv is not UTF-8 \(byte 0xe9 at offset 13\)"),
        ("a.json", b'[{"text": "x"}, {"text": ]', r"a\.json: bad JSON at character 16"),
        ("a.json", b'[{"text": "x"}] [{"text": "y"}]', r"a\.json: bad JSON at character 16"),
        ("a.json", b'[{"text": "x"}, ', r"a\.json is truncated: it ends within its array"),
        ("a.json", b'[{"content": "x"}]', r"record 0 has no field 'text'; it has content; set text_field=content"),
        ("a.arrow", b"hello", r"a\.arrow is not an Arrow file or stream"),
        ("a.parquet.gz", b"hello", r"a parquet file is read in parts, so it cannot be compressed as a whole"),
        ("a.txt", FRENCH.encode("utf-16"), r"not UTF-8 \(its byte-order mark is that of UTF-16\); set encoding=utf-16"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_all(tmp_path / name))
