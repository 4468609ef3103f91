"""The web: HTML pages, and WARC archives of them, by FastWARC and Resiliparse (the `web` extra)."""

import io
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Items, Skipped, pieces_of
from data_tools.readers.encodings import BLOCK
from data_tools.readers.open_file import open_bytes
from data_tools.readers.work_units import Slice
from megagpt.errors import UserError

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

MAX_PAGE = 2**27  # bytes
MAX_DEPTH = 1000  # of elements in elements: extracting takes time with its square
TAG = re.compile(rb"<(/?)([a-zA-Z][^\s/<>]*)(?:[^<>]*(/)>)?")
NOT_NESTED = frozenset(  # void elements, and those that the next of their kind closes
    b"area base br col embed hr img input link meta param source track wbr "
    b"dd dt li option p tbody td tfoot th thead tr".split()
)
ENDS_DRAWING = frozenset(  # https://html.spec.whatwg.org/#parsing-main-inforeign: within SVG, these end it
    b"b big blockquote body br center code dd div dl dt em embed h1 h2 h3 h4 h5 h6 head hr i img li listing menu meta "
    b"nobr ol p pre ruby s small span strong strike sub sup table tt u ul var".split()
)


def read_html(part: Slice, source: SourceConfig) -> Items:
    path = part.file.path
    with open_bytes(part.file) as raw:
        yield from _read_page(raw.read(MAX_PAGE + 1), path, 0, partial(str, path))


def read_warc(part: Slice, source: SourceConfig) -> Items:
    """The HTML pages among the archive's responses."""
    path = part.file.path
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise UserError(f"{path} needs the web extra; install it with: pip install megagpt[web]") from error
    number = 0
    with open_bytes(part.file) as raw:
        for record in ArchiveIterator(_Told(raw), parse_http=False):
            block = _block_of(record, path)
            if record.record_type == WarcRecordType.response and record.is_http:
                yield from _read_response(block, path, number)
            number += record.record_type == WarcRecordType.response


def _block_of(record: "WarcRecord", path: str) -> bytes:
    """At most MAX_PAGE + 1 bytes of what the record holds. Raises UserError if the archive ends before it does."""
    block: bytes = record.reader.read(MAX_PAGE + 1)
    size, declared = len(block), record.headers.get("Content-Length") or ""
    while more := record.reader.read(BLOCK):
        size += len(more)
    if not declared.isdigit() or size < int(declared):
        raise UserError(f"{path} ends within a record, so it was cut off; fetch it again or leave it out")
    return block


def _read_response(block: bytes, path: str, number: int) -> Items:
    from fastwarc.warc import WarcRecord

    where = partial("{} response {}".format, path, number)
    response = WarcRecord()  # of its own, because what cannot be decoded ends the reading of a whole archive
    response.is_http = True
    response.set_bytes_content(block)
    try:
        response.parse_http(auto_decode="all")
        if "html" not in (response.http_content_type or ""):
            return
        page = block if len(block) > MAX_PAGE else response.reader.read(MAX_PAGE + 1)
    except OSError:
        yield Skipped("a response that cannot be decoded", where)
    else:
        yield from _read_page(page, path, number, where)


def _read_page(page: bytes, path: str, position: int, where: Callable[[], str]) -> Items:
    if len(page) > MAX_PAGE:
        yield Skipped(f"a page of more than {MAX_PAGE:,} bytes", where)
    elif is_deeper(page, MAX_DEPTH):
        yield Skipped(f"a page of more than {MAX_DEPTH:,} elements in each other", where)
    else:
        yield from pieces_of(_page_text(page, path), position, where)


def is_deeper(page: bytes, most: int) -> bool:
    """Whether more than `most` elements are within each other, going by the tags alone: no tree is built.

    An end tag closes the last of its name, wherever that is, so of a page with mismatched tags this is a guess.
    """
    depth, n_open = 0, Counter[bytes]()
    for tag in TAG.finditer(page) if page.count(b"<") > most else ():
        is_end, name, is_closed = tag[1], tag[2].lower(), tag[3]
        if not is_end and name in ENDS_DRAWING:
            depth -= n_open.pop(b"svg", 0) + n_open.pop(b"math", 0)
        if name in NOT_NESTED or (is_closed and (n_open[b"svg"] or n_open[b"math"])):
            continue
        if not is_end:
            n_open[name] += 1
            depth += 1
        elif n_open[name]:
            n_open[name] -= 1
            depth -= 1
        if depth > most:
            return True
    return False


def _page_text(page: bytes, path: str) -> str:
    """Its main text, without navigation and scripts, in whatever encoding it says or seems to be."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise UserError(f"{path} needs the web extra; install it with: pip install megagpt[web]") from error
    encoding = "utf-8" if _is_utf8(page) else detect_encoding(page) or "latin-1"
    tree = HTMLTree.parse_from_bytes(page, encoding)
    text: str = extract_plain_text(tree, main_content=True)
    return text


class _Told(io.RawIOBase):
    """A stream that knows its position, which FastWARC asks for and a decompressed one does not tell."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._at = raw, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at


def _is_utf8(page: bytes) -> bool:
    try:
        page.decode()
    except UnicodeDecodeError:
        return False
    return True
