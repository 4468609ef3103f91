"""What reading yields: documents in pieces, so that none has to fit into memory, and records that are none.

A piece is at most PIECE characters (so at most 4 MiB of UTF-8), cut after the last white space that fits.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

PIECE = 2**20  # characters


class Piece(NamedTuple):
    """A document, or a stretch of a long one: the others of its position come right before or after it."""

    text: str
    position: int  # in its file: byte of a JSON line's start, row of a table, otherwise number of the document
    is_first: bool = True
    is_last: bool = True


class Skipped(NamedTuple):
    """A record that is no document; or, if it came to light within one, the end of a document to be dropped."""

    reason: str
    where: Callable[[], str]  # counting lines is slow, and only the first of a kind is reported


Items = Iterator[Piece | Skipped]


def pieces_of(text: object, position: int, where: Callable[[], str], field: str = "text") -> Items:
    """A value that a record holds as its text."""
    if not isinstance(text, str):
        yield Skipped(f"{field!r} is not a string", where)
    elif not text or text.isspace():
        yield Skipped("empty", where)
    elif not _is_unicode(text):
        yield Skipped("lone surrogate, which is no Unicode text", where)
    else:
        cuts = cut(text, PIECE)
        for i, piece in enumerate(cuts):
            yield Piece(piece, position, i == 0, i == len(cuts) - 1)


def cut(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, each cut after the last white space that fits, if there is any."""
    pieces = []
    start = 0
    while len(text) - start > most:
        end = start + cut_at(text, start, most)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start else [text]


def cut_at(text: str, start: int, most: int) -> int:
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
