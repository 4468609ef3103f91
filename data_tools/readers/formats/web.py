"""Read HTML pages, and WARC archives of them, with FastWARC and Resiliparse (the `web` extra)."""

import io
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord, pieces_of
from data_tools.readers.formats.encodings import BLOCK
from data_tools.readers.input_file import FileSlice, UnreadableFile
from data_tools.readers.open_file import open_bytes
from megagpt.errors import UserError

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

MAX_PAGE = 2**27  # bytes
MAX_DEPTH = 1000  # of nested elements: extraction takes time with the square of it
TAG = re.compile(rb"<(/?)([a-zA-Z][^\s/<>]*)(?:[^<>]*(/)>)?")
NOT_NESTED = frozenset(  # void elements, and those that the next element of the same name closes
    b"area base br col embed hr img input link meta param source track wbr "
    b"dd dt li option p tbody td tfoot th thead tr".split()
)
ENDS_DRAWING = frozenset(  # these end an SVG around them: https://html.spec.whatwg.org/#parsing-main-inforeign
    b"b big blockquote body br center code dd div dl dt em embed h1 h2 h3 h4 h5 h6 head hr i img li listing menu meta "
    b"nobr ol p pre ruby s small span strong strike sub sup table tt u ul var".split()
)


def read_html(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the main text of one HTML page."""
    path = slice_.file.path
    with open_bytes(slice_.file) as raw:
        yield from _read_page(raw.read(MAX_PAGE + 1), path, 0, partial(str, path))


def read_warc(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the main text of each HTML page among an archive's responses."""
    path = slice_.file.path
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise UserError(f"{path} needs the web extra; install it with: pip install megagpt[web]") from error
    number = 0
    with open_bytes(slice_.file) as raw:
        for record in ArchiveIterator(_WithPosition(raw), parse_http=False):
            block = _block_of(record, path)
            if record.record_type == WarcRecordType.response and record.is_http:
                yield from _read_response(block, path, number)
            number += record.record_type == WarcRecordType.response


def _block_of(record: "WarcRecord", path: str) -> bytes:
    """At most MAX_PAGE + 1 bytes of a record's content. Raises UserError if the archive ends within the record."""
    block: bytes = record.reader.read(MAX_PAGE + 1)
    size, declared = len(block), record.headers.get("Content-Length") or ""
    while more := record.reader.read(BLOCK):
        size += len(more)
    if not declared.isdigit() or size < int(declared):
        raise UnreadableFile(f"{path} is truncated: it ends within a record; fetch it again or leave it out")
    return block


def _read_response(block: bytes, path: str, number: int) -> Pieces:
    from fastwarc.warc import WarcRecord

    where = partial("{} response {}".format, path, number)
    # a record of its own: within the archive's iterator, a response that cannot be decoded would end the whole archive
    response = WarcRecord()
    response.is_http = True
    response.set_bytes_content(block)
    try:
        response.parse_http(auto_decode="all")
        if "html" not in (response.http_content_type or ""):
            return
        page = block if len(block) > MAX_PAGE else response.reader.read(MAX_PAGE + 1)
    except OSError:
        yield SkippedRecord("a response that cannot be decoded", where)
    else:
        yield from _read_page(page, path, number, where)


def _read_page(page: bytes, path: str, position: int, where: Callable[[], str]) -> Pieces:
    if len(page) > MAX_PAGE:
        yield SkippedRecord(f"a page of more than {MAX_PAGE:,} bytes", where)
    elif is_deeper(page, MAX_DEPTH):
        yield SkippedRecord(f"a page with more than {MAX_DEPTH:,} nested elements", where)
    else:
        yield from pieces_of(_page_text(page, path), position, where)


def is_deeper(page: bytes, most: int) -> bool:
    """Tell whether more than `most` elements are nested, judged by the tags alone:

    building the tree is what takes long.

    An end tag is taken to close the last element of its name, so for a page with mismatched tags this is a guess.
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
    """Return the page's main text, without navigation and scripts, decoded as the page declares or as detected."""
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


class _WithPosition(io.RawIOBase):
    """A stream that counts its position: FastWARC asks for it, and a decompressing stream does not know it."""

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
