"""Plain text: documents are cut into pieces at white space, wherever the blocks of a stream end."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from data_support import all_documents, run
from hypothesis import given
from hypothesis import strategies as st
from reader_support import read_all

import data_tools.readers.document_pieces
import data_tools.readers.formats.plain_text
from data_tools.readers.document_pieces import DocumentPiece, SkippedRecord, cut
from data_tools.readers.formats.plain_text import _documents_in
from megagpt.config.parsing import unescaped
from megagpt.errors import UserError


@given(text=st.text(st.sampled_from("ab \n\u00e9"), max_size=60), most=st.integers(1, 10))
def test_cut_pieces_make_the_text_again_and_end_at_white_space(text: str, most: int) -> None:
    pieces = cut(text, most)
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for piece in pieces[:-1]:
        assert piece[-1] in " \n" or not set(piece) & set(" \n")


@given(
    text=st.text(st.sampled_from("ab \n|"), max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    most=st.integers(2, 9),
    separator=st.sampled_from(["", "|", "||", "a|"]),
)
def test_a_streamed_text_is_cut_as_if_it_had_been_whole(text: str, cuts: list[int], most: int, separator: str) -> None:
    edges = [0, *sorted(cuts), len(text)]
    blocks = [text[begin:end] for begin, end in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tools.readers.formats.plain_text, "PIECE_CHARACTERS", most)
        streamed = list(_documents_in(iter(blocks), separator))
    documents = [part + separator for part in text.split(separator)] if separator else [text]
    if separator:
        documents[-1] = documents[-1].removesuffix(separator)
        if documents[-1] == "" and len(documents) > 1:
            documents.pop()
    expected = [
        (number, piece, i == 0, i == len(cut(whole, most)) - 1)
        for number, whole in enumerate(documents)
        for i, piece in enumerate(cut(whole, most))
    ]
    assert streamed == expected


def test_a_text_that_stops_being_text_later_on_is_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.formats.plain_text, "PIECE_CHARACTERS", 10)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"twenty good bytes or so \xff")
    items = list(read_all(tmp_path / "in"))
    assert all(isinstance(item, DocumentPiece) and not item.is_last for item in items[:-1])
    assert isinstance(items[-1], SkippedRecord)
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 0xff at offset 24\); set encoding=auto"):
        list(read_all(tmp_path / "in" / "a.txt"))


SEPARATORS = {
    r"\n\n": "\n\n",
    '"\\n\\n"': "\n\n",
    r"\t": "\t",
    r"\x1e": "\x1e",
    r"\u2029": "\u2029",
    r"\\n": "\\n",
    "<|endoftext|>": "<|endoftext|>",
    "7": "7",
}


@pytest.mark.parametrize("typed", SEPARATORS)
def test_a_separator_is_what_a_user_types_in_a_shell(typed: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SEPARATORS[typed].join(["one", "two", "three"]))
    options = ("tokenizer_type=char", "val_fraction=0", f"split_text_at={typed}")
    assert run("build", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", *options) == 0
    assert [text.removesuffix(SEPARATORS[typed]) for text in all_documents(tmp_path / "out")] == ["one", "three", "two"]


def test_a_separator_that_is_not_in_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"one\r\n\r\ntwo")
    (tmp_path / "in" / "b.txt").write_text("three\n\n")
    (tmp_path / "in" / "c.txt").write_text("four\n\nfive")
    (tmp_path / "in" / "d.csv").write_text("text\nsix\n")
    options = ("tokenizer_type=char", "val_fraction=0", r"split_text_at=\n\n")
    assert run("build", "--input", tmp_path / "in", "--out", tmp_path / "out", *options) == 0
    note = r"text files without split_text_at='\n\n' in them are one document each"
    assert f"  {note}: 1 (first: {tmp_path / 'in' / 'a.txt'})" in (out := capsys.readouterr().out)
    assert f"  split_text_at has no effect on csv files: 1 (first: {tmp_path / 'in' / 'd.csv'})" in out
    assert "in them are one document each" in (tmp_path / "out" / "report.html").read_text()


@given(st.text())
def test_escapes_of_json_are_understood_on_the_command_line(text: str) -> None:
    escaped = json.dumps(text).replace('\\"', '"')[1:-1]
    if text.isascii() and "\b" not in text:
        assert unescaped(escaped) == text
    assert unescaped(text.replace("\\", "\\\\")) == text
    assert unescaped(r"\d+ \ud800 C:\dir") == r"\d+ \ud800 C:\dir"
