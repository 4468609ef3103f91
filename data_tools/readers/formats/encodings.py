"""Decode bytes to text: choose the encoding, decode in blocks, and name the byte that does not fit."""

import codecs
import itertools
from collections.abc import Generator, Iterator
from typing import IO

import charset_normalizer

BLOCK = 2**20  # bytes read at once
DETECT = 2**20  # bytes from which an encoding is detected
MAX_LINE = 2**27  # characters
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # tested before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NotTextError(ValueError):
    """The bytes are not text in the wanted encoding; `way_out` is the fix for the message."""

    def __init__(self, kind: str, detail: str, way_out: str) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.way_out = kind, way_out


def encoding_of(head: bytes, wanted: str) -> str:
    """Return the encoding of a file, from its first bytes and the `encoding` option (a codec's name, or auto).

    Raises NotTextError for an empty or binary file, and where a byte-order mark contradicts UTF-8.
    """
    if not head:
        raise NotTextError("empty", "", "leave it out")
    from_mark = bom_encoding(head)
    if wanted == "auto":
        return from_mark or _detected(head)
    if wanted == "utf-8":
        if from_mark not in (None, "utf-8-sig"):
            way_out = f"set encoding={from_mark} or encoding=auto"
            raise NotTextError("not UTF-8", f"its byte-order mark is that of {from_mark.upper()}", way_out)
        if (at := head.find(b"\0")) >= 0:
            raise NotTextError("binary", f"a NUL byte at offset {at}", "give text, or a format by its file name")
        return from_mark or wanted
    return wanted


def bom_encoding(head: bytes) -> str | None:
    """Return the encoding that a byte-order mark names, or None without a mark."""
    return next((name for mark, name in BOMS.items() if head.startswith(mark)), None)


def has_plain_newlines(encoding: str) -> bool:
    """Tell whether byte 10, and nothing else, ends a line: true of all encodings but UTF-16, UTF-32 and EBCDIC."""
    return "a\n".encode(encoding)[-2:] == b"a\n"


def _detected(head: bytes) -> str:
    """UTF-8 if it fits, because detection by statistics is wrong more often. `head` may end within a character."""
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
    """Yield the rest of a stream, BLOCK bytes at a time."""
    while block := raw.read(BLOCK):
        yield block


def decoded(blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """Decode block by block. Raises NotTextError with the offset of the first byte that does not fit."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0  # bytes before the block
    for block in itertools.chain(blocks, [None]):
        # the decoder holds back the bytes of a character that the block before left unfinished
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            at = done - held + error.start
            detail = f"byte 0x{error.object[error.start]:02x} at offset {at}"
            raise NotTextError(not_in(encoding), detail, "set encoding=auto or the encoding's name") from error
        done += len(block or b"")


def not_in(encoding: str) -> str:
    """Return the reason for bytes that are not text in the encoding, as reports name it."""
    return f"not {encoding.upper().removesuffix('-SIG')}"


def lines(blocks: Iterator[str]) -> Generator[str, None, None]:
    """Lines, each with its newline, from blocks of text. Raises NotTextError for a line of more than MAX_LINE."""
    parts, size = [], 0  # of the line that the block before left unfinished
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        size += len(first)
        if size > MAX_LINE:
            raise NotTextError(
                "not in lines", f"more than {MAX_LINE:,} characters without a newline", "repair it or leave it out"
            )
        if others:
            yield "".join(parts) + "\n"
            *whole, last = others
            yield from (line + "\n" for line in whole)
            parts, size = [last], len(last)
    if last := "".join(parts):
        yield last
