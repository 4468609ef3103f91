"""An input file, and a slice of one: what the builder knows of them before it reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.errors import UserError

EXPANSION = 4  # text per byte of a compressed file: a guess, used to plan work units only


class UnreadableFile(UserError):
    """One input file is at fault, rather than the command: the builder counts it, unless `strict` is set."""


@dataclass(frozen=True)
class InputFile:
    path: str  # absolute, or a URL
    kind: str  # the format's name in by_format.FORMATS
    compression: str  # a codec of open_file.COMPRESSIONS; "" is none
    size: int  # bytes
    state: str  # changes when the file does
    named: bool  # by the user, rather than found in a folder
    encoding: str  # the `encoding` option, as given


@dataclass(frozen=True)
class FileSlice:
    """A range of a file in its format's unit: bytes, row groups or record batches. An empty range has no text."""

    file: InputFile
    start: int
    end: int
    size: int  # bytes of its text, roughly


def whole_file(file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    """Yield one slice, for formats that can only be read from the start."""
    yield FileSlice(file, 0, file.size, file.size * (EXPANSION if file.compression else 1))
