"""The web: HTML pages, and WARC archives of them, by FastWARC and Resiliparse (the `web` extra)."""

import io
from functools import partial
from typing import IO

from data_tools.config import SourceConfig
from data_tools.inputs import Slice, open_bytes
from data_tools.pieces import Items, pieces_of
from megagpt.errors import UserError

MAX_PAGE = 2**27  # bytes


def read_html(part: Slice, source: SourceConfig) -> Items:
    with open_bytes(part.file) as raw:
        yield from pieces_of(_page_text(raw.read(MAX_PAGE), part.file.path), 0, partial(str, part.file.path))


def read_warc(part: Slice, source: SourceConfig) -> Items:
    """The HTML pages among the archive's responses."""
    path = part.file.path
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise UserError(f"{path} needs the web extra; install it with: pip install megagpt[web]") from error
    with open_bytes(part.file) as raw:
        responses = ArchiveIterator(_Told(raw), record_types=WarcRecordType.response, parse_http=True)
        for number, record in enumerate(responses):
            if record.http_content_type and "html" in record.http_content_type:
                where = partial("{} response {}".format, path, number)
                yield from pieces_of(_page_text(record.reader.read(MAX_PAGE), path), number, where)


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
