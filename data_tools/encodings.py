"""Bytes to text: which encoding, and a clear word where there is none."""

import codecs
import itertools
from collections.abc import Iterator
from typing import IO

import charset_normalizer

from megagpt.errors import UserError

BLOCK = 2**20  # bytes read at once
DETECT = 2**20  # bytes that are enough to tell an encoding by
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class NotTextError(ValueError):
    """Bytes that are no text in the encoding that was asked for."""

    def __init__(self, kind: str, detail: str, way_out: str) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.way_out = kind, way_out


def encoding_of(head: bytes, wanted: str) -> str:
    if not head:
        raise NotTextError("empty", "", "leave it out")
    by_mark = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if wanted == "auto":
        return by_mark or _detected(head)
    if wanted == "utf-8":
        if by_mark == "utf-16":
            raise NotTextError("not UTF-8", "its byte-order mark says UTF-16", "set encoding=utf-16 or encoding=auto")
        if (at := head.find(b"\0")) >= 0:
            raise NotTextError("binary", f"a NUL byte at offset {at}", "give text, or a format by its file name")
        return by_mark or wanted
    try:
        return codecs.lookup(wanted).name
    except LookupError as error:
        raise UserError(
            f"encoding={wanted!r} is unknown; give one that Python knows, such as latin-1, or auto"
        ) from error


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
            at, name = done - held + error.start, encoding.upper().removesuffix("-SIG")
            detail = f"byte 0x{error.object[error.start]:02x} at offset {at}"
            raise NotTextError(f"not {name}", detail, "set encoding=auto or the encoding's name") from error
        done += len(block or b"")
