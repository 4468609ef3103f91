"""Read JSON: a record on each line (JSON lines), one array of records, or records one after the other."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import orjson

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord
from data_tools.readers.formats.encodings import (
    BLOCK,
    NotTextError,
    blocks,
    bom_encoding,
    decoded,
    encoding_of,
    has_plain_newlines,
    lines,
    not_in,
)
from data_tools.readers.formats.fields import read_record
from data_tools.readers.input_file import FileSlice, InputFile, UnreadableFile, whole_file
from data_tools.readers.open_file import open_bytes

MAX_RECORD = 2**27  # bytes: a record is parsed as a whole
VALUE, ITEM = re.compile(r"[^ \t\r\n]"), re.compile(r"[^ \t\r\n,]")  # the first character of the next one


def byte_ranges(file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    """Cut JSON lines at any byte: read_jsonl looks for the newlines itself."""
    if file.compression or not _can_be_cut(file):
        yield from whole_file(file, unit_bytes)
        return
    for start in range(0, file.size, unit_bytes):
        end = min(start + unit_bytes, file.size)
        yield FileSlice(file, start, end, end - start)


def _can_be_cut(file: InputFile) -> bool:
    """Tell whether lines can be found from the middle of the file, because byte 10 ends them and nothing else does."""
    encoding: str | None = file.encoding
    if encoding == "auto":
        with open_bytes(file) as raw:
            encoding = bom_encoding(raw.read(4))
    return encoding is None or has_plain_newlines(encoding)


def read_jsonl(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of the lines that begin within the slice; the last may end beyond it."""
    path = slice_.file.path
    try:
        encoding = _encoding_of(slice_, source.encoding)
        if has_plain_newlines(encoding):
            yield from _read_lines(slice_, source, encoding)
        else:
            yield from _read_decoded(slice_, source, encoding)
    except NotTextError as problem:
        if slice_.file.named or problem.kind != "binary":
            raise UnreadableFile(f"{path} is {problem}; {problem.way_out}") from problem
        yield SkippedRecord(problem.kind, partial(str, path))


def _encoding_of(slice_: FileSlice, wanted: str) -> str:
    """Return the file's encoding, from its first bytes, so that all slices of a file agree."""
    with open_bytes(slice_.file) as raw:
        head = raw.read(BLOCK if wanted == "auto" else 4)
    if not head or (wanted == "utf-8" and bom_encoding(head) is None):
        return "utf-8"
    encoding = encoding_of(head, wanted)
    if slice_.end - slice_.start < slice_.file.size and not has_plain_newlines(encoding):
        raise NotTextError("not UTF-8", f"it seems to be {encoding}", f"set encoding={encoding}")
    return encoding


def _read_decoded(slice_: FileSlice, source: SourceConfig, encoding: str) -> Pieces:
    """Read a whole file whose bytes do not show where lines end. Positions count characters, not bytes."""
    with open_bytes(slice_.file) as raw:
        at = 0
        for number, line in enumerate(lines(decoded(blocks(raw), encoding)), 1):
            if not line.isspace():
                yield from _parse_line(line, source, at, partial("{}:{}".format, slice_.file.path, number))
            at += len(line)


def _read_lines(slice_: FileSlice, source: SourceConfig, encoding: str) -> Pieces:
    """Read the lines that begin in a slice of a file in which byte 10 ends a line."""
    with open_bytes(slice_.file) as raw:
        at = slice_.start
        if at:
            # the slice before reads the line that begins in it to its end. One byte back, so that a slice that starts
            # with a line skips nothing but the newline before it
            raw.seek(at - 1)
            at += _skip_line(raw) - 1
        while (at < slice_.end or slice_.file.compression) and (line := raw.readline(MAX_RECORD)):
            size, where = len(line), partial(_line_of, slice_, at)
            if size == MAX_RECORD and not line.endswith(b"\n"):
                size += _skip_line(raw)
                yield SkippedRecord(f"a JSON line of more than {MAX_RECORD:,} bytes", where)
            elif not line.isspace():
                try:
                    text = line if encoding in ("utf-8", "utf-8-sig") else line.decode(encoding)
                    yield from _parse_line(text, source, at, where)
                except UnicodeDecodeError:
                    yield SkippedRecord(not_in(encoding), where)
            at += size


def _skip_line(raw: IO[bytes]) -> int:
    """Read up to and including the next newline, in blocks; returns the number of bytes."""
    skipped = 0
    while line := raw.readline(BLOCK):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _parse_line(line: bytes | str, source: SourceConfig, at: int, where: Callable[[], str]) -> Pieces:
    """Yield the pieces of one JSON line. Raises UnicodeDecodeError for bytes that are not UTF-8."""
    try:
        record = _loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        yield SkippedRecord("bad JSON", where)
    else:
        yield from _parse_record(record, source, at, where)


def _loads(line: bytes | str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # slower, but it accepts what orjson refuses: surrogates, NaN, large integers, a byte-order mark
        return json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))


def _parse_record(record: Any, source: SourceConfig, position: int, where: Callable[[], str]) -> Pieces:
    if not isinstance(record, dict):
        yield SkippedRecord("not a JSON object", where)
    else:
        yield from read_record(record, source, position, where)


def _line_of(slice_: FileSlice, at: int) -> str:
    """Return 'file:line' of the line at byte `at`, counted from the start of the file."""
    with open_bytes(slice_.file) as raw:
        newlines = 0
        while at > 0 and (block := raw.read(min(at, BLOCK))):
            newlines += block.count(b"\n")
            at -= len(block)
    return f"{slice_.file.path}:{newlines + 1}"


def read_json(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of one array of objects, or of objects one after the other, on any number of lines."""
    path = slice_.file.path
    with open_bytes(slice_.file) as raw:
        head = raw.read(BLOCK)
        try:
            text = decoded(itertools.chain([head], blocks(raw)), encoding_of(head, source.encoding))
            for number, record in enumerate(_json_values(text, path)):
                yield from _parse_record(record, source, number, partial("{} record {}".format, path, number))
        except NotTextError as problem:
            if problem.kind == "empty" and not slice_.file.named:
                yield SkippedRecord("empty", partial(str, path))
                return
            raise UnreadableFile(f"{path} is {problem}; {problem.way_out}") from problem


def _json_values(blocks: Iterator[str], path: str) -> Iterator[Any]:
    """Parse values from a stream of text, with no more of it in memory than about twice the largest value.

    The state `place` is "start", then "array" and "end", or "values" for objects one after the other.
    """
    decoder, buffer, at = json.JSONDecoder(), "", 0
    done = 0  # characters before the buffer
    wanted = 1  # characters of the buffer from `at` on that parsing needs to go ahead
    place, at_end = "start", False
    while True:
        at = _next(ITEM if place == "array" else VALUE, buffer, at)
        if not at_end and len(buffer) - at < wanted:
            more = _at_least(blocks, wanted)
            buffer, done, at, at_end = buffer[at:] + more, done + at, 0, len(more) < wanted
        elif at == len(buffer):
            break
        elif place == "start":
            place, at = ("array", at + 1) if buffer[at] == "[" else ("values", at)
        elif place == "array" and buffer[at] == "]":
            place, at = "end", at + 1
        elif place == "end":
            raise _bad_json(path, done + at)
        else:
            try:
                record, end = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                if at_end or len(buffer) - at > MAX_RECORD:
                    raise _bad_json(path, done + at) from error
                wanted = 2 * (len(buffer) - at)  # the value is not complete: try again with twice as much
            else:
                yield record
                at, wanted = end, 1
    if place == "array":
        raise UnreadableFile(f"{path} is truncated: it ends within its array; repair it or leave it out")


def _next(pattern: re.Pattern[str], buffer: str, at: int) -> int:
    found = pattern.search(buffer, at)
    return found.start() if found else len(buffer)


def _bad_json(path: str, at: int) -> UnreadableFile:
    return UnreadableFile(f"{path}: bad JSON at character {at:,}; repair it, or give JSON lines")


def _at_least(blocks: Iterator[str], size: int) -> str:
    """Return at least `size` characters, or all that are left."""
    parts: list[str] = []
    while size > 0 and (block := next(blocks, None)) is not None:
        parts.append(block)
        size -= len(block)
    return "".join(parts)
