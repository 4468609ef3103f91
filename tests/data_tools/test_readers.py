"""Every format, encoding and place gives the same documents; what cannot be read is named."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_support import document
from hypothesis import assume, given
from hypothesis import strategies as st

import data_tools.readers.document_pieces
import data_tools.readers.jsonl
import data_tools.readers.plain_text
import data_tools.readers.web
import data_tools.readers.work_units
import data_tools.storage.document_store
from data_tools.build import build
from data_tools.config import BuildConfig, SourceConfig, load_config
from data_tools.readers.by_format import read_slice
from data_tools.readers.document_pieces import Items, Piece, Skipped, cut
from data_tools.readers.find_files import find_files
from data_tools.readers.plain_text import _documents_in
from data_tools.readers.web import is_deeper
from data_tools.readers.work_units import plan_units
from data_tools.storage.document_store import open_texts, read_documents, read_texts
from megagpt.errors import UserError

TEXTS = [document(i, n_words=20) for i in range(20)]


def read_all(path: Path | str, *, strict: bool = False, **options: object) -> Items:
    source = SourceConfig(name="test", paths=(str(path),), **options)
    for unit in plan_units([(source.name, find_files(source))]):
        for part in unit.slices:
            yield from read_slice(part, source, strict=strict)


def texts_of(items: Iterator[Piece | Skipped]) -> list[str]:
    """Documents put together again from their pieces."""
    texts: list[str] = []
    for item in items:
        assert isinstance(item, Piece), item
        if item.is_first:
            texts.append("")
        texts[-1] += item.text
    return texts


def skipped(items: Items) -> list[Skipped]:
    return [item for item in items if isinstance(item, Skipped)]


# --- formats --------------------------------------------------------------------------------------------------


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def csv(texts: list[str], separator: str = ",") -> bytes:
    rows = "".join(f'{i}{separator}"{text.replace(chr(34), chr(34) * 2)}"\r\n' for i, text in enumerate(texts))
    return f"id{separator}text\r\n{rows}".encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def arrow(texts: list[str], new: Callable = pa.ipc.new_file) -> bytes:
    table = pa.table({"text": texts})
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def arrow_stream(texts: list[str]) -> bytes:
    return arrow(texts, pa.ipc.new_stream)


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=1).encode()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "a.jsonl.zst": lambda texts: zstandard.compress(jsonl(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(jsonl(texts)),
    "two members.jsonl.gz": lambda texts: gzip.compress(jsonl(texts[:7])) + gzip.compress(jsonl(texts[7:])),
    "two frames.jsonl.zst": lambda texts: zstandard.compress(jsonl(texts[:7])) + zstandard.compress(jsonl(texts[7:])),
    "two streams.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts[:7])) + bz2.compress(jsonl(texts[7:])),
    "two streams.jsonl.xz": lambda texts: lzma.compress(jsonl(texts[:7])) + lzma.compress(jsonl(texts[7:])),
    "a.ndjson": jsonl,
    "array.json": json_array,
    "lines.json": jsonl,
    "array.json.gz": lambda texts: gzip.compress(json_array(texts)),
    "a.csv": csv,
    "a.csv.gz": lambda texts: gzip.compress(csv(texts)),
    "a.tsv": lambda texts: csv(texts, "\t"),
    "a.parquet": parquet,
    "file.arrow": arrow,
    "stream.arrow": arrow_stream,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](TEXTS))
    assert texts_of(read_all(tmp_path / name)) == TEXTS
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 50)  # one unit for each slice
    monkeypatch.setattr(data_tools.readers.jsonl, "BLOCK", 7)
    assert texts_of(read_all(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_positions_are_unique_within_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](TEXTS))
    positions = [item.position for item in read_all(tmp_path / name) if isinstance(item, Piece)]
    assert len(set(positions)) == len(TEXTS)
    assert positions == sorted(positions)


def test_a_source_has_its_own_field_and_format(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert texts_of(read_all(tmp_path / "a.data", format="jsonl", text_field="body")) == ["one", "two"]


def test_web_pages_and_archives_give_their_main_text(tmp_path: Path) -> None:
    page = "<html><head><script>x()</script></head><body><main><p>Hello caf\u00e9</p><p>World</p></main></body></html>"
    (tmp_path / "a.html").write_text(page)
    [text] = texts_of(read_all(tmp_path / "a.html"))
    assert text.split() == ["Hello", "caf\u00e9", "World"]
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(warc([page, page.replace("World", "Again")])))
    first, second = texts_of(read_all(tmp_path / "a.warc.gz"))
    assert (first, second.split()) == (text, ["Hello", "caf\u00e9", "Again"])


def warc(pages: list[str]) -> bytes:
    return b"".join(warc_record(page.encode()) for page in pages)


def warc_record(payload: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/html; charset=utf-8", *headers, "", ""]
    body = "\r\n".join(lines).encode() + payload
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        "WARC-Target-URI: http://localhost/\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def chunked(payload: bytes) -> bytes:
    chunks = [payload[i : i + 50] for i in range(0, len(payload), 50)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


PAGE = "<html><body><main><p>Hello caf\u00e9</p>" + "<p>World</p>" * 20 + "</main></body></html>"


@pytest.mark.parametrize(
    ("encode", "headers"),
    [
        (gzip.compress, ["Content-Encoding: gzip"]),
        (zlib.compress, ["Content-Encoding: deflate"]),
        (chunked, ["Transfer-Encoding: chunked"]),
        (lambda page: chunked(gzip.compress(page)), ["Content-Encoding: gzip", "Transfer-Encoding: chunked"]),
    ],
)
def test_a_response_is_decoded_as_its_headers_say(
    encode: Callable[[bytes], bytes], headers: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.warc").write_bytes(warc([PAGE]) + warc_record(encode(PAGE.encode()), *headers))
    plain, decoded = texts_of(read_all(tmp_path / "a.warc"))
    assert plain == decoded


def test_a_response_that_is_not_what_its_headers_say_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    records = [warc_record(PAGE.encode(), header) for header in ("Content-Encoding: gzip", "Content-Encoding: x")]
    (tmp_path / "a.warc").write_bytes(b"".join(records) + warc([PAGE]))
    *bad, good = read_all(tmp_path / "a.warc")
    assert isinstance(good, Piece)
    assert [(item.reason, item.where()) for item in skipped(iter(bad))] == [
        ("a response that cannot be decoded", f"{tmp_path}/a.warc response {i}") for i in range(2)
    ]


def test_an_archive_that_ends_within_a_record_is_refused_by_name(tmp_path: Path) -> None:
    archive = warc([PAGE, PAGE])
    one, inside = len(warc([PAGE])), [len(warc([PAGE])) + at for at in (10, 60, 250, 400)]
    for end in (20, one - 5, *inside, 2 * one - 5):
        (tmp_path / "a.warc").write_bytes(archive[:end])
        with pytest.raises(UserError, match=r"a\.warc"):
            list(read_all(tmp_path / "a.warc"))
    (tmp_path / "a.warc").write_bytes(archive)
    assert len(list(read_all(tmp_path / "a.warc"))) == 2


def test_a_page_too_large_or_too_deep_is_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.readers.web, "MAX_PAGE", 500_000)
    pages = ["<div>" * 99_000, "<p>much</p>" * 50_000, PAGE]
    for name in ("a.html", "b.html", "c.html"):
        (tmp_path / name).write_text(pages["abc".index(name[0])])
    (tmp_path / "d.warc").write_bytes(
        warc(pages) + warc_record(gzip.compress(b"x" * 500_001), "Content-Encoding: gzip")
    )
    deep, large = "a page of more than 1,000 elements in each other", "a page of more than 500,000 bytes"
    items = list(read_all(tmp_path))
    assert [item.reason for item in skipped(iter(items))] == [deep, large, deep, large, large]
    assert len(items) == 7


@pytest.mark.parametrize(
    ("page", "depth"),
    [
        (b"<div><b></b><p></div>" * 30, 2),
        (b"<div>" * 30 + b"</div>" * 30, 30),
        (b"<p>one<br>two<li>three" * 30, 0),
        (b"<a href='x'><DIV></a>" * 30, 31),
        (b"<div/>" * 30, 30),
        (b"<svg>" + b"<path d='1'/>" * 30 + b"</svg>", 1),
        (b"<svg>" + b"<div/>" * 30, 30),
        (b"<div></span>" * 30, 30),
    ],
)
def test_elements_within_elements_are_counted_by_their_tags(page: bytes, depth: int) -> None:
    assert next(most for most in range(99) if not is_deeper(page, most)) == depth


# --- pieces ---------------------------------------------------------------------------------------------------


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
        patch.setattr(data_tools.readers.plain_text, "PIECE", most)
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
    assert [item.text for item in items if isinstance(item, Piece)] == [text for text in texts if text.strip()]
    assert len(items) == len(texts)


def test_a_line_too_long_to_parse_is_skipped_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.jsonl, "MAX_RECORD", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "x" * 5000, "two"]))
    items = list(read_all(tmp_path / "a.jsonl"))
    assert [item.text for item in items if isinstance(item, Piece)] == ["one", "two"]
    [item] = skipped(iter(items))
    assert (item.reason, item.where()) == ("a JSON line of more than 1,000 bytes", f"{tmp_path}/a.jsonl:2")


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=20), rows=st.integers(1, 8))
def test_documents_are_written_in_batches_as_if_in_one(
    sizes: list[tuple[int, bool]], rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("texts") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tools.storage.document_store, "BATCH_ROWS", rows)
        with open_texts(prefix) as writer:
            for number, (n_pieces, kept) in enumerate(sizes):
                writer.begin()
                for piece in range(n_pieces):
                    writer.add(f"{number}.{piece}")
                writer.end(7, number, kept=kept)
    assert list(read_texts(prefix)) == [
        (number, f"{number}.{piece}") for number, (n_pieces, _) in enumerate(sizes) for piece in range(n_pieces)
    ]
    documents = read_documents(prefix)
    assert [(document.position, document.slice, document.kept) for document in documents] == [
        (number, 7, kept) for number, (_, kept) in enumerate(sizes)
    ]
    kept_ones = [document for document in documents if document.kept]
    assert (writer.kept, writer.kept_bytes) == (len(kept_ones), sum(document.bytes for document in kept_ones))
    assert writer.sha256 == hashlib.sha256(b"".join(document.doc for document in kept_ones)).hexdigest()


# --- encodings ------------------------------------------------------------------------------------------------

FRENCH = "Voil\u00e0 l'\u00e9t\u00e9, o\u00f9 l'on go\u00fbte la cr\u00e8me br\u00fbl\u00e9e \u00e0 No\u00ebl. " * 20


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
    with pytest.raises(UserError, match=r"its byte-order mark says UTF-16\); set encoding=utf-16"):
        list(read_all(tmp_path / "a.jsonl"))


def test_a_line_in_another_encoding_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "good"}\n')
    [bad, good] = read_all(tmp_path / "a.jsonl")
    assert (bad.reason, bad.where()) == ("not UTF-8", f"{tmp_path}/a.jsonl:1")
    assert good.text == "good"
    assert texts_of(read_all(tmp_path / "a.jsonl", encoding="latin1")) == ["caf\xe9", "good"]


def test_a_text_that_stops_being_text_later_on_is_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.plain_text, "PIECE", 10)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"twenty good bytes or so \xff")
    items = list(read_all(tmp_path / "in"))
    assert all(isinstance(item, Piece) and not item.is_last for item in items[:-1])
    assert isinstance(items[-1], Skipped)
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 0xff at offset 24\); set encoding=auto"):
        list(read_all(tmp_path / "in" / "a.txt"))


# --- bad input ------------------------------------------------------------------------------------------------

CUT_OFF = {
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts))[:-9],
    "a.jsonl.zst": lambda texts: zstandard.compress(jsonl(texts))[:-9],
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


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("rest", [b"garbage", b"\0\0garbage", b"\xfd7zXZ\0"])
def test_a_compressed_file_with_something_else_behind_it_is_refused(
    compress: Callable[[bytes], bytes], rest: bytes, tmp_path: Path
) -> None:
    ending = {gzip.compress: "gz", zstandard.compress: "zst", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(compress(jsonl(TEXTS)) + rest)
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        list(read_all(tmp_path / f"a.jsonl.{ending}"))


def test_streams_of_xz_may_be_padded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl(TEXTS)) + bytes(8) + lzma.compress(b"") + bytes(4))
    assert texts_of(read_all(tmp_path / "a.jsonl.xz")) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,content\n1,x\n", r"a\.csv has no column 'text'; it has id, content; set text_field=NAME"),
        ("a.csv", b"id,text\n1,caf\xe9\n", r"a\.csv is not UTF-8 \(byte 0xe9 at offset 13\)"),
        ("a.json", b'[{"text": "x"}, {"text": ]', r"a\.json: bad JSON at character 16"),
        ("a.json", b'[{"text": "x"}] [{"text": "y"}]', r"a\.json: bad JSON at character 16"),
        ("a.json", b'[{"text": "x"}, ', r"a\.json ends within its array, so it was cut off"),
        ("a.json", b'[{"content": "x"}]', r"record 0 has no field 'text'; it has content; set text_field=NAME"),
        ("a.arrow", b"hello", r"a\.arrow is not an Arrow file or stream"),
        ("a.parquet.gz", b"hello", r"a parquet file is read at any place, so it cannot be compressed as a whole"),
        ("a.txt", FRENCH.encode("utf-16"), r"not UTF-8 \(its byte-order mark says UTF-16\); set encoding=utf-16"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_all(tmp_path / name))


@pytest.mark.parametrize("name", ["latin1x", "hex", "base64", "rot13", "zlib", "undefined", "", "a\0"])
def test_what_is_no_text_encoding_is_named_before_anything_is_read(name: str) -> None:
    with pytest.raises(UserError, match="is no text encoding; give one that Python knows, such as latin-1"):
        load_config(BuildConfig, None, [f"encoding={json.dumps(name)}"])


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


# --- places ---------------------------------------------------------------------------------------------------


def test_globs_and_folders_find_the_same_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    assert texts_of(read_all(tmp_path)) == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert texts_of(read_all(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts_of(read_all(tmp_path / "**" / "*.jsonl")) == ["a.jsonl", "b.jsonl", "c/d.jsonl"]


def test_a_glob_that_matches_only_folders_reads_them(tmp_path: Path) -> None:
    for name in ("x1/a.jsonl", "x1/y/b.jsonl", "x2/c.jsonl", "z/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    assert texts_of(read_all(tmp_path / "x*")) == ["x1/a.jsonl", "x1/y/b.jsonl", "x2/c.jsonl"]


def test_a_folder_of_symbolic_links_says_how_to_read_them(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(jsonl(TEXTS))
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "a.jsonl").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match="holds only symbolic links") as refused:
        find_files(SourceConfig(name="test", paths=(str(tmp_path / "snapshot"),)))
    pattern = str(refused.value).split("'")[1]
    assert texts_of(read_all(pattern)) == TEXTS


def test_the_output_of_a_build_is_no_input_of_it(tmp_path: Path) -> None:
    for name in ("a.txt", "out/b.txt", "out/.build/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(path: str) -> list[str]:
        files = find_files(SourceConfig(name="test", paths=(str(tmp_path / path),)), leave_out=tmp_path / "out")
        return [str(Path(file.path).relative_to(tmp_path)) for file in files]

    assert found(".") == found("*") == found("**/*.txt") == ["a.txt"]
    for path in ("out", "out/b.txt", "out/../out/b.txt"):
        with pytest.raises(UserError, match=r"is in the output folder, .*out; give another --out, or leave it out"):
            found(path)


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("hello")
    with pytest.raises(UserError, match=r"caf\\udce9\.txt' is no name in UTF-8; rename it or leave it out"):
        list(read_all(tmp_path))


def parquet_without_groups() -> bytes:
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, pa.schema({"text": pa.string()})).close()
    return sink.getvalue().to_pybytes()


EMPTY: dict[str, bytes] = {
    **{f"a.{ending}": b"" for ending in ("txt", "jsonl", "json", "csv", "parquet", "arrow", "html", "warc")},
    "a.jsonl.gz": gzip.compress(b""),
    "a.json.gz": gzip.compress(b""),
    "a.csv.gz": gzip.compress(b""),
    "no rows.parquet": parquet([]),
    "no groups.parquet": parquet_without_groups(),
    "no batches.arrow": arrow([]),
    "no batches in the stream.arrow": arrow_stream([]),
    "no values.json": b"[]",
    "no rows.csv": b"id,text\n",
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_without_documents_is_no_mistake_in_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(EMPTY[name])
    assert {item.reason for item in skipped(read_all(tmp_path))} <= {"empty"}


def test_files_without_documents_are_built_from_beside_others_and_not_alone(tmp_path: Path) -> None:
    config = BuildConfig(tokenizer_type="char", val_fraction=0, workers=1)
    for name, content in EMPTY.items():
        (tmp_path / name.split(".")[0]).mkdir(exist_ok=True)
        (tmp_path / name.split(".")[0] / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(jsonl(TEXTS))
    empties = [tmp_path / name for name in {name.split(".")[0]: 0 for name in EMPTY}]
    report = build([*empties, tmp_path / "good.jsonl"], tmp_path / "beside", config)
    assert report["skipped"]["empty"]["documents"] == 12
    for folder in empties:
        with pytest.raises(UserError, match="there is no text to train a tokenizer on"):
            build([folder], tmp_path / "alone", config)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real object-store server on this machine, and the environment that leads to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = boto3.client("s3", endpoint_url=endpoint)
        store.create_bucket(Bucket="corpus")
        for name, content in FORMATS.items():
            store.put_object(Bucket="corpus", Key=f"{name.split('.')[0]}/{name}", Body=content(TEXTS))
        store.put_object(Bucket="corpus", Key="tree/.git/x.py", Body=b"hidden")
        store.put_object(Bucket="corpus", Key="tree/b/x.py", Body=b"print('b')")
        store.put_object(Bucket="corpus", Key="tree/a.py", Body=b"print('a')")
        yield "s3://corpus"
    server.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.parquet", "file.arrow"])
def test_an_object_store_gives_the_same_documents(name: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 500)
    assert texts_of(read_all(f"{bucket}/{name.split('.')[0]}/{name}")) == TEXTS


def test_an_object_stores_folders_and_globs(bucket: str) -> None:
    assert texts_of(read_all(f"{bucket}/tree")) == ["print('a')", "print('b')"]
    assert texts_of(read_all(f"{bucket}/tree/*.py")) == ["print('a')"]
    assert texts_of(read_all(f"{bucket}/tree", include=("x.*",))) == ["print('b')"]
    with pytest.raises(UserError, match="s3://corpus/nothing: there is no such file or folder"):
        list(read_all(f"{bucket}/nothing"))


def test_a_url_that_leads_nowhere_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/a\.jsonl"):
        list(read_all("s3://no-such-bucket/a.jsonl"))
    with pytest.raises(UserError, match=r"foo://bar: Protocol not known"):
        list(read_all("foo://bar"))
