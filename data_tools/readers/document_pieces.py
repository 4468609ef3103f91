"""Define what readers yield: documents in pieces, so that none has to fit into memory, skipped records and notes.

A record is an entry of an input file: a JSON line, a row of a table, a web page. Most become documents. A piece has
at most PIECE_CHARACTERS characters (so at most 4 MiB of UTF-8) and ends after the last white space that fits.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

PIECE_CHARACTERS = 2**20


class DocumentPiece(NamedTuple):
    """A document, or a part of a long one: pieces with the same position follow each other in order."""

    text: str
    position: int  # in its file: first byte of a JSON line, row of a table, otherwise number of the document
    is_first: bool = True
    is_last: bool = True


class SkippedRecord(NamedTuple):
    """A record that is not a document.

    After a piece that is not its document's last, it means that the rest cannot be read: drop that document.
    """

    reason: str
    where: Callable[[], str]  # a function: counting lines is slow, and only the first of each reason is reported


class Note(NamedTuple):
    """A surprise about a document that is kept, for the report."""

    text: str
    where: Callable[[], str]


Pieces = Iterator[DocumentPiece | SkippedRecord | Note]


def pieces_of(text: object, position: int, where: Callable[[], str], field: str = "text") -> Pieces:
    """Yield the pieces of a record's text, or the reason why it has none."""
    if not isinstance(text, str):
        yield SkippedRecord(f"{field!r} is not a string", where)
    elif not text or text.isspace():
        yield SkippedRecord("empty", where)
    elif not _is_unicode(text):
        yield SkippedRecord("lone surrogate, which is not Unicode text", where)
    else:
        cuts = cut(text, PIECE_CHARACTERS)
        for i, piece in enumerate(cuts):
            yield DocumentPiece(piece, position, i == 0, i == len(cuts) - 1)


def cut(text: str, most: int) -> list[str]:
    """Cut a text into pieces of at most `most` characters, each after the last white space that fits, if any."""
    pieces = []
    start = 0
    while len(text) - start > most:
        end = start + cut_at(text, start, most)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start else [text]


def cut_at(text: str, start: int, most: int) -> int:
    """Return the length of the piece that cut() makes at `start`, where more than `most` characters follow."""
    end = 1 + max(text.rfind(space, start, start + most) for space in " \n\t")
    return end - start if end > start else most


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
