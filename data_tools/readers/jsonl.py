"""JSON: a record on each line, or one array of records, or records one after the other."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import orjson

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Items, Skipped, pieces_of
from data_tools.readers.encodings import (
    BLOCK,
    NotTextError,
    blocks,
    decoded,
    encoding_of,
    has_plain_newlines,
    lines,
    marked,
    not_in,
)
from data_tools.readers.open_file import open_bytes
from data_tools.readers.work_units import Slice
from megagpt.errors import UserError

MAX_RECORD = 2**27  # bytes: a record is parsed as a whole
VALUE, ITEM = re.compile(r"[^ \t\r\n]"), re.compile(r"[^ \t\r\n,]")  # where the next one begins


def read_jsonl(part: Slice, source: SourceConfig) -> Items:
    """The lines that begin within the slice; one that straddles its end is read whole, here."""
    path = part.file.path
    try:
        encoding = _encoding_of(part, source.encoding)
        if has_plain_newlines(encoding):
            yield from _read_lines(part, source, encoding)
        else:
            yield from _read_decoded(part, source, encoding)
    except NotTextError as problem:
        if part.file.named or problem.kind != "binary":
            raise UserError(f"{path} is {problem}; {problem.way_out}") from problem
        yield Skipped(problem.kind, partial(str, path))


def _encoding_of(part: Slice, wanted: str) -> str:
    """The same for all slices of a file: it is its beginning that tells."""
    with open_bytes(part.file) as raw:
        head = raw.read(BLOCK if wanted == "auto" else 4)
    if not head or (wanted == "utf-8" and marked(head) is None):
        return "utf-8"
    encoding = encoding_of(head, wanted)
    if part.end - part.start < part.file.size and not has_plain_newlines(encoding):
        raise NotTextError("not UTF-8", f"{encoding} seems to fit", f"set encoding={encoding}")
    return encoding


def _read_decoded(part: Slice, source: SourceConfig, encoding: str) -> Items:
    """All of a file whose bytes do not show where its lines end. A position counts characters."""
    with open_bytes(part.file) as raw:
        at = 0
        for number, line in enumerate(lines(decoded(blocks(raw), encoding)), 1):
            if not line.isspace():
                yield from _parse_line(line, source, at, partial("{}:{}".format, part.file.path, number))
            at += len(line)


def _read_lines(part: Slice, source: SourceConfig, encoding: str) -> Items:
    with open_bytes(part.file) as raw:
        at = part.start
        if at:
            raw.seek(at - 1)
            at += _skip_line(raw) - 1  # the rest of a line that began in the slice before, or just its newline
        while (at < part.end or part.file.compression) and (line := raw.readline(MAX_RECORD)):
            size, where = len(line), partial(_line_of, part, at)
            if size == MAX_RECORD and not line.endswith(b"\n"):
                size += _skip_line(raw)
                yield Skipped(f"a JSON line of more than {MAX_RECORD:,} bytes", where)
            elif not line.isspace():
                try:
                    text = line if encoding in ("utf-8", "utf-8-sig") else line.decode(encoding)
                    yield from _parse_line(text, source, at, where)
                except UnicodeDecodeError:
                    yield Skipped(not_in(encoding), where)
            at += size


def _skip_line(raw: IO[bytes]) -> int:
    """Bytes up to and including the next newline, read in blocks."""
    skipped = 0
    while line := raw.readline(BLOCK):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _parse_line(line: bytes | str, source: SourceConfig, at: int, where: Callable[[], str]) -> Items:
    """Raises UnicodeDecodeError for bytes that are not UTF-8."""
    try:
        record = _loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        yield Skipped("bad JSON", where)
    else:
        yield from _parse_record(record, source, at, where)


def _loads(line: bytes | str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(
            line if isinstance(line, str) else line.decode("utf-8-sig")
        )  # surrogates, NaN, large integers


def _parse_record(record: Any, source: SourceConfig, position: int, where: Callable[[], str]) -> Items:
    if not isinstance(record, dict):
        yield Skipped("not a JSON object", where)
    elif source.text_field not in record and position > 0:
        yield Skipped(f"no field {source.text_field!r}", where)
    elif source.text_field not in record:  # nor, most likely, in the rest of the file
        fields = ", ".join(sorted(record)) or "none"
        raise UserError(
            f"{where()} has no field {source.text_field!r}; it has {fields}; set text_field=NAME, or format=text"
        )
    else:
        yield from pieces_of(record[source.text_field], position, where, source.text_field)


def _line_of(part: Slice, at: int) -> str:
    """file:line of the line at byte `at`."""
    with open_bytes(part.file) as raw:
        newlines = 0
        while at > 0 and (block := raw.read(min(at, BLOCK))):
            newlines += block.count(b"\n")
            at -= len(block)
    return f"{part.file.path}:{newlines + 1}"


def read_json(part: Slice, source: SourceConfig) -> Items:
    """One array of objects, or objects one after the other, however they are laid out."""
    path = part.file.path
    with open_bytes(part.file) as raw:
        head = raw.read(BLOCK)
        try:
            text = decoded(itertools.chain([head], blocks(raw)), encoding_of(head, source.encoding))
            for number, record in enumerate(_json_values(text, path)):
                yield from _parse_record(record, source, number, partial("{} record {}".format, path, number))
        except NotTextError as problem:
            if problem.kind == "empty" and not part.file.named:
                yield Skipped("empty", partial(str, path))
                return
            raise UserError(f"{path} is {problem}; {problem.way_out}") from problem


def _json_values(blocks: Iterator[str], path: str) -> Iterator[Any]:
    decoder, buffer, at, done, wanted = json.JSONDecoder(), "", 0, 0, 1  # `done`: characters before the buffer
    place, at_end = "start", False  # then "array" and "end", or "values"
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
                wanted = 2 * (len(buffer) - at)  # its end is still to come
            else:
                yield record
                at, wanted = end, 1
    if place == "array":
        raise UserError(f"{path} ends within its array, so it was cut off; repair it or leave it out")


def _next(pattern: re.Pattern[str], buffer: str, at: int) -> int:
    found = pattern.search(buffer, at)
    return found.start() if found else len(buffer)


def _bad_json(path: str, at: int) -> UserError:
    return UserError(f"{path}: bad JSON at character {at:,}; repair it, or give JSON lines")


def _at_least(blocks: Iterator[str], size: int) -> str:
    """So many characters or more, unless there are no more."""
    parts: list[str] = []
    while size > 0 and (block := next(blocks, None)) is not None:
        parts.append(block)
        size -= len(block)
    return "".join(parts)
