"""HTML pages and WARC archives: the main text of each page, and pages that are skipped."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from reader_support import read_all, skipped, texts_of

import data_tools.readers.document_pieces
import data_tools.readers.formats.web
from data_tools.readers.document_pieces import DocumentPiece
from data_tools.readers.formats.web import is_deeper
from megagpt.errors import UserError


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
    assert isinstance(good, DocumentPiece)
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
    monkeypatch.setattr(data_tools.readers.formats.web, "MAX_PAGE", 500_000)
    pages = ["<div>" * 99_000, "<p>much</p>" * 50_000, PAGE]
    for name in ("a.html", "b.html", "c.html"):
        (tmp_path / name).write_text(pages["abc".index(name[0])])
    (tmp_path / "d.warc").write_bytes(
        warc(pages) + warc_record(gzip.compress(b"x" * 500_001), "Content-Encoding: gzip")
    )
    deep, large = "a page with more than 1,000 nested elements", "a page of more than 500,000 bytes"
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
