"""Bytes to text: which encoding, and a clear word where there is none."""

import codecs
import itertools
from collections.abc import Generator, Iterator
from typing import IO

import charset_normalizer

BLOCK = 2**20  # bytes read at once
DETECT = 2**20  # bytes that are enough to tell an encoding by
MAX_LINE = 2**27  # characters
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NotTextError(ValueError):
    """Bytes that are no text in the encoding that was asked for."""

    def __init__(self, kind: str, detail: str, way_out: str) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.way_out = kind, way_out


def encoding_of(head: bytes, wanted: str) -> str:
    if not head:
        raise NotTextError("empty", "", "leave it out")
    by_mark = marked(head)
    if wanted == "auto":
        return by_mark or _detected(head)
    if wanted == "utf-8":
        if by_mark not in (None, "utf-8-sig"):
            way_out = f"set encoding={by_mark} or encoding=auto"
            raise NotTextError("not UTF-8", f"its byte-order mark says {by_mark.upper()}", way_out)
        if (at := head.find(b"\0")) >= 0:
            raise NotTextError("binary", f"a NUL byte at offset {at}", "give text, or a format by its file name")
        return by_mark or wanted
    return wanted


def marked(head: bytes) -> str | None:
    """What a byte-order mark says."""
    return next((name for mark, name in BOMS.items() if head.startswith(mark)), None)


def has_plain_newlines(encoding: str) -> bool:
    """Whether a byte 10 ends a line and nothing else does: it is so of all but UTF-16, UTF-32 and IBM's."""
    return "a\n".encode(encoding)[-2:] == b"a\n"


def _detected(head: bytes) -> str:
    """UTF-8 where that fits, because guessing by statistics is wrong more often; `head` may end within a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        best = charset_normalizer.from_bytes(head[:DETECT]).best()
        if best is None:
            raise NotTextError("binary", "no text encoding fits", "leave it out") from None
        return best.encoding
    if (at := head.find(b"\0")) >= 0:
        raise NotTextError("binary", f"a NUL byte at offset {at}", "leave it out")
    return "utf-8"


def blocks(raw: IO[bytes]) -> Iterator[bytes]:
    while block := raw.read(BLOCK):
        yield block


def decoded(blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0
    for block in itertools.chain(blocks, [None]):
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            at = done - held + error.start
            detail = f"byte 0x{error.object[error.start]:02x} at offset {at}"
            raise NotTextError(not_in(encoding), detail, "set encoding=auto or the encoding's name") from error
        done += len(block or b"")


def not_in(encoding: str) -> str:
    return f"not {encoding.upper().removesuffix('-SIG')}"


def lines(blocks: Iterator[str]) -> Generator[str, None, None]:
    """Lines with their ends, each a newline."""
    parts, size = [], 0  # of a line so far
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        size += len(first)
        if size > MAX_LINE:
            raise NotTextError("not in lines", f"more than {MAX_LINE:,} characters in one", "repair it or leave it out")
        if others:
            yield "".join(parts) + "\n"
            *whole, last = others
            yield from (line + "\n" for line in whole)
            parts, size = [last], len(last)
    if last := "".join(parts):
        yield last
