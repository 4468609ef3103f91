"""Text, JSON and tables in any encoding, named by the user or detected."""

import gzip
import json
from pathlib import Path

import pytest
from reader_support import FRENCH, csv, read_all, texts_of

import data_tools.readers.work_units
from data_tools.config import BuildConfig, load_config
from megagpt.errors import UserError


@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        ("utf-8", {}),
        ("utf-8-sig", {}),
        ("utf-8", {"encoding": "auto"}),
        ("utf-16", {"encoding": "utf-16"}),
        ("utf-16", {"encoding": "auto"}),
        ("latin-1", {"encoding": "latin-1"}),
        ("latin-1", {"encoding": "auto"}),
    ],
)
def test_an_encoding_is_named_or_detected(encoding: str, options: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(FRENCH.encode(encoding))
    assert texts_of(read_all(tmp_path / "a.txt", **options)) == [FRENCH]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin1", "cp037", "gbk"])
def test_json_and_tables_may_be_in_any_encoding(
    name: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} {FRENCH}".encode(encoding, "ignore").decode(encoding) for i in range(9)]
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = {"a.json": f"[{','.join(records)}]", "a.csv": csv(texts).decode()}
    data = content.get(name, "\n\n".join(records)).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 500)
    assert texts_of(read_all(tmp_path / name, encoding=encoding)) == texts
    assert texts_of(read_all(tmp_path / name, encoding=encoding.upper())) == texts
    if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert texts_of(read_all(tmp_path / name, encoding="auto")) == texts


@pytest.mark.parametrize("name", ["latin1x", "hex", "base64", "rot13", "zlib", "undefined", "", "a\0"])
def test_what_is_no_text_encoding_is_named_before_anything_is_read(name: str) -> None:
    with pytest.raises(UserError, match="is not a text encoding; give one that Python knows, such as latin-1"):
        load_config(BuildConfig, None, [f"encoding={json.dumps(name)}"])
