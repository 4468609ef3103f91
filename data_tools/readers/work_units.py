"""Cut the input into work units of similar size, each a few slices of files that one task reads.

Units depend on the input alone, never on the number of workers, so neither does anything built from them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.readers.by_format import FORMATS
from data_tools.readers.input_file import FileSlice, InputFile, UnreadableFile, whole_file

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**23, 2**28
UNITS = 1000  # the number aimed at, as far as the two sizes above allow it


@dataclass(frozen=True)
class WorkUnit:
    """The input of one task: consecutive slices of one source."""

    source: str
    slices: tuple[FileSlice, ...]

    @property
    def size(self) -> int:
        """Return the bytes of text, roughly."""
        return sum(slice_.size for slice_ in self.slices)


def cut_into_units(
    sources: Sequence[tuple[str, Sequence[InputFile]]], *, skip_unreadable: bool = False
) -> list[WorkUnit]:
    """Return the work units of the (name, files) of each source, in order.

    With `skip_unreadable`, a file that cannot be cut is one slice, and its reader refuses it.
    """
    total = sum(file.size for _, files in sources for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units = []
    for name, files in sources:
        slices: list[FileSlice] = []
        size = 0
        for slice_ in (slice_ for file in files for slice_ in _slices(file, unit_bytes, skip_unreadable)):
            slices.append(slice_)
            size += slice_.size
            if size >= unit_bytes:
                units.append(WorkUnit(name, tuple(slices)))
                slices, size = [], 0
        if slices:
            units.append(WorkUnit(name, tuple(slices)))
    return units


def _slices(file: InputFile, unit_bytes: int, skip_unreadable: bool) -> Iterator[FileSlice]:
    """Yield at least one slice: a file without text gets an empty one, so that reports count it as skipped."""
    try:
        slices = list(FORMATS[file.kind].cut(file, unit_bytes)) if file.size else []
    except UnreadableFile:
        if not skip_unreadable:
            raise
        slices = list(whole_file(file, unit_bytes))
    yield from slices or [FileSlice(file, 0, 0, 0)]
