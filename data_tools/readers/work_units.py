"""Inputs to units of work: files cut into slices of similar size.

Units depend on the inputs alone, never on the number of workers, so neither does anything built from them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from data_tools.readers.encodings import has_plain_newlines, marked
from data_tools.readers.open_file import InputFile, open_arrow, open_bytes, open_parquet

if TYPE_CHECKING:
    pass

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**23, 2**28
UNITS = 1000  # about so many, between those sizes
EXPANSION = 4  # of compressed text: a guess, for planning only


@dataclass(frozen=True)
class Slice:
    """A part of one file: bytes of JSON lines, row groups of Parquet, record batches of Arrow, all of anything else."""

    file: InputFile
    start: int
    end: int
    size: int  # of its text, roughly


@dataclass(frozen=True)
class Unit:
    """What one task reads: slices of one source."""

    source: str
    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.slices)


def plan_units(sources: Sequence[tuple[str, Sequence[InputFile]]]) -> list[Unit]:
    """Consecutive slices of each source, in units of similar size."""
    total = sum(file.size for _, files in sources for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units = []
    for name, files in sources:
        slices: list[Slice] = []
        for piece in (piece for file in files for piece in _slices(file, unit_bytes)):
            slices.append(piece)
            if sum(piece.size for piece in slices) >= unit_bytes:
                units.append(Unit(name, tuple(slices)))
                slices = []
        if slices:
            units.append(Unit(name, tuple(slices)))
    return units


def _slices(file: InputFile, unit_bytes: int) -> Iterator[Slice]:
    if not file.size:
        yield Slice(file, 0, 0, 0)
    elif file.kind == "jsonl" and not file.compression and _can_be_cut(file):
        for start in range(0, file.size, unit_bytes):
            end = min(start + unit_bytes, file.size)
            yield Slice(file, start, end, end - start)
    elif file.kind in ("parquet", "arrow"):
        groups = ROW_GROUPS[file.kind](file)
        yield from (Slice(file, i, i + 1, size) for i, size in enumerate(groups))
        if not groups:
            yield Slice(file, 0, 0, 0)
    else:
        yield Slice(file, 0, file.size, file.size * (EXPANSION if file.compression else 1))


def _can_be_cut(file: InputFile) -> bool:
    """At byte 10, because that ends a line."""
    encoding: str | None = file.encoding
    if encoding == "auto":
        with open_bytes(file) as raw:
            encoding = marked(raw.read(4))
    return encoding is None or has_plain_newlines(encoding)


def _parquet_groups(file: InputFile) -> list[int]:
    with open_parquet(file) as parquet:
        return [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups)]


def _arrow_batches(file: InputFile) -> list[int]:
    """A file can be entered at any batch; a stream, such as Hugging Face datasets writes, is read from its start."""
    with open_arrow(file) as reader:
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            return [file.size]
        n_batches = reader.num_record_batches
        return [file.size // n_batches] * n_batches if n_batches else []


ROW_GROUPS: dict[str, Callable[[InputFile], list[int]]] = {"parquet": _parquet_groups, "arrow": _arrow_batches}
