"""Inputs to documents: find the files, cut them into units of work, read a unit.

Units depend on the inputs alone, never on the number of workers, so neither does anything built from them.
"""

import fnmatch
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.config import ReadConfig
from megagpt.errors import UserError

Kind = Literal["text", "jsonl", "compressed jsonl", "parquet"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "compressed jsonl",
    ".jsonl.zst": "compressed jsonl",
    ".parquet": "parquet",
}
LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "node_modules"}  # and everything hidden
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**23, 2**28
UNITS = 1000  # about so many, between those sizes
COMPRESSION = 4  # a guess, for planning only


@dataclass(frozen=True)
class InputFile:
    path: Path
    kind: Kind
    source: int  # which --input it came from
    named: bool  # by the user, rather than found in a folder


@dataclass(frozen=True)
class Piece:
    """A part of one file: bytes of JSON lines, row groups of Parquet, all of anything else."""

    file: InputFile
    number: int  # of the file, over all inputs
    start: int
    end: int
    size: int  # of its text, roughly


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Document:
    text: str
    source: int
    position: str  # unique over all inputs


@dataclass(frozen=True)
class Skipped:
    reason: str
    where: Callable[[], str]  # counting lines is slow, and only the first of a kind is reported


def find_files(inputs: Sequence[Path], config: ReadConfig) -> list[InputFile]:
    """All input files in a fixed order: as given, folders sorted."""
    files = []
    for source, path in enumerate(inputs):
        if path.is_dir():
            files += [InputFile(found, _kind(found), source, named=False) for found in _walk(path, config.include)]
        elif path.is_file() and path.stat().st_size == 0:
            raise UserError(f"--input {path} is empty; leave it out")
        elif path.is_file():
            files.append(InputFile(path.absolute(), _kind(path), source, named=True))
        else:
            hint = "; key=value options go after --out DIR" if "=" in path.name else ""
            raise UserError(f"--input {path}: there is no such file or folder{hint}")
    if not files:
        raise UserError(f"no files to read in {', '.join(map(str, inputs))}" + _include_hint(config))
    return files


def _walk(root: Path, include: Sequence[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root.absolute(), onerror=_refuse):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            wanted = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
            if wanted and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; repair it or leave it out")


def _include_hint(config: ReadConfig) -> str:
    return f" (with include={','.join(config.include)})" if config.include else ""


def _kind(path: Path) -> Kind:
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), "text")


def plan_units(files: Sequence[InputFile]) -> list[Unit]:
    """Consecutive pieces in units of similar size."""
    total = sum(file.path.stat().st_size for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    unit: list[Piece] = []
    filled = 0
    for number, file in enumerate(files):
        for start, end, size in _ranges(file, unit_bytes):
            unit.append(Piece(file, number, start, end, size))
            filled += size
            if filled >= unit_bytes:
                units.append(tuple(unit))
                unit, filled = [], 0
    return [*units, tuple(unit)] if unit else units


def _ranges(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, size) of the file's pieces."""
    size = file.path.stat().st_size
    if file.kind == "jsonl":
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield start, end, end - start
    elif file.kind == "parquet":
        metadata = _open_parquet(file.path).metadata
        for group in range(metadata.num_row_groups):
            yield group, group + 1, metadata.row_group(group).total_byte_size
    else:
        yield 0, size, size * (COMPRESSION if file.kind == "compressed jsonl" else 1)


def read_unit(unit: Unit, config: ReadConfig) -> Iterator[Document | Skipped]:
    for piece in unit:
        path = str(piece.file.path)
        try:
            for item in READERS[piece.file.kind](piece, config):
                if isinstance(item, Document) and not item.text.strip():
                    yield Skipped("empty", partial(str, path))
                elif isinstance(item, Document) and not _is_unicode(item.text):
                    yield Skipped("lone surrogate, which is no Unicode text", partial(str, path))
                else:
                    yield item
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}; repair it or leave it out") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(piece: Piece, config: ReadConfig) -> Iterator[Document | Skipped]:
    path = piece.file.path
    data = path.read_bytes()
    problem = _why_not_text(data)
    if problem and piece.file.named:
        raise UserError(f"{path} is {problem}; give UTF-8 text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    if problem:
        yield Skipped(problem.split(" (")[0], partial(str, path))
    else:
        for i, text in enumerate(_documents_in(data.decode(), config.split_text_at)):
            yield Document(text, piece.file.source, f"{piece.number}:{i}")


def _documents_in(text: str, separator: str) -> list[str]:
    """The whole text, or what ends in each separator, which stays part of it."""
    if not separator:
        return [text]
    *cut, last = text.split(separator)
    return [*(part + separator for part in cut), *([last] if last else [])]


def _why_not_text(data: bytes) -> str | None:
    if not data:
        return "empty"
    if (at := data.find(b"\0")) >= 0:
        return f"binary (a NUL byte at offset {at})"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})"
    return None


def _read_jsonl(piece: Piece, config: ReadConfig) -> Iterator[Document | Skipped]:
    """The lines that begin within the piece; one that straddles its end is read whole, here."""
    with piece.file.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began in the piece before, or just its newline
        at = file.tell()
        while at < piece.end:
            line = file.readline()
            yield from _parse_line(line, piece, config, at)
            at += len(line)


def _read_compressed_jsonl(piece: Piece, config: ReadConfig) -> Iterator[Document | Skipped]:
    # Arrow's decompression, because it alone notices a truncated .zst
    with io.BufferedReader(pa.input_stream(str(piece.file.path))) as file:
        at = 0
        for line in file:
            yield from _parse_line(line, piece, config, at)
            at += len(line)


def _parse_line(line: bytes, piece: Piece, config: ReadConfig, at: int) -> Iterator[Document | Skipped]:
    if not line.strip():
        return
    where = partial(_line_of, piece.file, at)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        yield _broken("bad JSON", where, config)
        return
    if not isinstance(record, dict):
        yield _broken("not a JSON object", where, config)
    elif config.text_field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise UserError(f"{where()} has no field {config.text_field!r}; it has {fields}; set text_field=NAME")
    elif not isinstance(record[config.text_field], str):
        yield _broken(f"{config.text_field!r} is not a string", where, config)
    else:
        yield Document(record[config.text_field], piece.file.source, f"{piece.number}:{at}")


def _broken(reason: str, where: Callable[[], str], config: ReadConfig) -> Skipped:
    if config.strict:
        raise UserError(f"{where()}: {reason}; repair it, or set strict=false to skip such records")
    return Skipped(reason, where)


def _line_of(file: InputFile, at: int) -> str:
    """file:line of the line at byte `at`."""
    plain = file.kind == "jsonl"
    stream = file.path.open("rb") if plain else io.BufferedReader(pa.input_stream(str(file.path)))
    with stream:
        newlines = 0
        while at > 0:
            block = stream.read(min(at, 2**20))
            newlines += block.count(b"\n")
            at -= len(block)
    return f"{file.path}:{newlines + 1}"


def _read_parquet(piece: Piece, config: ReadConfig) -> Iterator[Document | Skipped]:
    path = piece.file.path
    parquet = _open_parquet(path)
    if config.text_field not in parquet.schema_arrow.names:
        columns = ", ".join(parquet.schema_arrow.names)
        raise UserError(f"{path} has no column {config.text_field!r}; it has {columns}; set text_field=NAME")
    row = 0
    try:
        for batch in parquet.iter_batches(1024, row_groups=[piece.start], columns=[config.text_field]):
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield _parse_value(value, piece, config, row)
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: column {config.text_field!r} cannot be read as text: {error}") from error


def _parse_value(value: bytes | None, piece: Piece, config: ReadConfig, row: int) -> Document | Skipped:
    where = partial("{} row group {} row {}".format, piece.file.path, piece.start, row)
    if value is None:
        return _broken(f"{config.text_field!r} is not a string", where, config)
    try:
        return Document(value.decode(), piece.file.source, f"{piece.number}:{piece.start}:{row}")
    except UnicodeDecodeError:
        return _broken("not UTF-8", where, config)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "compressed jsonl": _read_compressed_jsonl,
    "parquet": _read_parquet,
}


def size_of(unit: Unit) -> int:
    return sum(piece.size for piece in unit)
