"""JSON: a record on each line, or one array of records, or records one after the other."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import orjson

from data_tools.config import SourceConfig
from data_tools.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of
from data_tools.inputs import Slice, open_bytes
from data_tools.pieces import Items, Skipped, pieces_of
from megagpt.errors import UserError

MAX_RECORD = 2**27  # bytes: a record is parsed as a whole


def read_jsonl(part: Slice, source: SourceConfig) -> Items:
    """The lines that begin within the slice; one that straddles its end is read whole, here."""
    with open_bytes(part.file) as raw:
        at = part.start
        if at:
            raw.seek(at - 1)
            at += _skip_line(raw) - 1  # the rest of a line that began in the slice before, or just its newline
        while (at < part.end or part.file.compression) and (line := raw.readline(MAX_RECORD)):
            size = len(line)
            if size == MAX_RECORD and not line.endswith(b"\n"):
                size += _skip_line(raw)
                yield Skipped(f"a JSON line of more than {MAX_RECORD:,} bytes", partial(_line_of, part, at))
            elif not line.isspace():
                yield from _parse_line(line, part, source, at)
            at += size


def _skip_line(raw: IO[bytes]) -> int:
    """Bytes up to and including the next newline, read in blocks."""
    skipped = 0
    while line := raw.readline(BLOCK):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _parse_line(line: bytes, part: Slice, source: SourceConfig, at: int) -> Items:
    where = partial(_line_of, part, at)
    try:
        record = _loads(line if source.encoding in ("utf-8", "auto") else line.decode(source.encoding))
    except (ValueError, RecursionError):
        yield Skipped("bad JSON", where)
    else:
        yield from _parse_record(record, source, at, where)


def _loads(line: bytes | str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)  # which knows more: lone surrogates, NaN, large integers


def _parse_record(record: Any, source: SourceConfig, position: int, where: Callable[[], str]) -> Items:
    if not isinstance(record, dict):
        yield Skipped("not a JSON object", where)
    elif source.text_field not in record:
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
            raise UserError(f"{path} is {problem}; {problem.way_out}") from problem


def _json_values(blocks: Iterator[str], path: str) -> Iterator[Any]:
    decoder, buffer, done, wanted = json.JSONDecoder(), "", 0, 1
    between = " \t\r\n"  # and, within an array, commas
    at_end = False
    while not at_end or buffer:
        while len(buffer) < wanted and not at_end:
            block = next(blocks, None)
            at_end, buffer = block is None, buffer + (block or "")
        stripped = buffer.lstrip(between)
        if between == " \t\r\n" and stripped.startswith("["):
            stripped, between = stripped[1:].lstrip(" \t\r\n,]"), " \t\r\n,]"
        done, buffer, wanted = done + len(buffer) - len(stripped), stripped, 1
        if not buffer:
            continue
        try:
            record, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            if at_end or len(buffer) > MAX_RECORD:
                raise UserError(f"{path}: bad JSON at character {done:,}; repair it, or give JSON lines") from error
            wanted = 2 * len(buffer)  # its end is still to come
            continue
        yield record
        done, buffer = done + end, buffer[end:]
