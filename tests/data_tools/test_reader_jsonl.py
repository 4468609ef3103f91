"""JSON lines: each line is read once wherever the file is cut, and a line that cannot be read is skipped and named."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reader_support import jsonl, read_all, skipped, texts_of

import data_tools.readers.document_pieces
import data_tools.readers.formats.jsonl
import data_tools.readers.work_units
from data_tools.readers.document_pieces import DocumentPiece
from megagpt.errors import UserError


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
    unit_bytes=st.integers(1, 200),
    final_newline=st.booleans(),
)
def test_jsonl_cut_anywhere_yields_each_line_once(
    texts: list[str], unit_bytes: int, final_newline: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    assume(texts or final_newline)  # an empty file is refused
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes((lines + "\n" * final_newline).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", unit_bytes)
        items = list(read_all(path))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == [text for text in texts if text.strip()]
    assert len(items) == len(texts)


def test_a_line_too_long_to_parse_is_skipped_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.formats.jsonl, "MAX_RECORD", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "x" * 5000, "two"]))
    items = list(read_all(tmp_path / "a.jsonl"))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == ["one", "two"]
    [item] = skipped(iter(items))
    assert (item.reason, item.where()) == ("a JSON line of more than 1,000 bytes", f"{tmp_path}/a.jsonl:2")


def test_the_encoding_of_json_lines_is_detected_by_the_beginning_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Это просто русский текст про погоду. " * 20, *["Да"] * 9]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("cp1251"))
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 50)
    assert texts_of(read_all(tmp_path / "a.jsonl", encoding="auto")) == texts
    (tmp_path / "a.jsonl").write_bytes(lines.encode("utf-16"))
    assert texts_of(read_all(tmp_path / "a.jsonl", encoding="auto")) == texts
    with pytest.raises(UserError, match=r"its byte-order mark is that of UTF-16\); set encoding=utf-16"):
        list(read_all(tmp_path / "a.jsonl"))


def test_a_line_in_another_encoding_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "good"}\n')
    [bad, good] = read_all(tmp_path / "a.jsonl")
    assert (bad.reason, bad.where()) == ("not UTF-8", f"{tmp_path}/a.jsonl:1")
    assert good.text == "good"
    assert texts_of(read_all(tmp_path / "a.jsonl", encoding="latin1")) == ["caf\xe9", "good"]


def test_the_bad_line_among_many_is_counted_and_its_number_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 5000)
    good = b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 12_344 + b'{"text": \n' + good * 100)
    items = list(read_all(tmp_path / "a.jsonl"))
    [item] = skipped(iter(items))
    assert len(items) == 12_445
    assert (item.reason, item.where()) == ("bad JSON", f"{tmp_path}/a.jsonl:12345")
    with pytest.raises(UserError, match=r"a\.jsonl:12345: bad JSON; repair it, or set strict=false"):
        list(read_all(tmp_path / "a.jsonl", strict=True))
