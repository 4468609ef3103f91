"""The file formats that the builder reads: one row of FORMATS each.

To add a format, write a reader (a generator of document pieces, such as `plain_text.read_text`) and add its row here.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Note, Pieces, SkippedRecord
from data_tools.readers.formats.csv_rows import read_csv
from data_tools.readers.formats.jsonl import byte_ranges, read_json, read_jsonl
from data_tools.readers.formats.plain_text import read_text
from data_tools.readers.formats.tables import read_arrow, read_parquet, record_batches, row_groups
from data_tools.readers.formats.web import read_html, read_warc
from data_tools.readers.input_file import FileSlice, InputFile, whole_file
from megagpt.errors import UserError


class FileFormat(NamedTuple):
    endings: tuple[str, ...]  # of file names, in lower case and before the ending of a compression
    read: Callable[[FileSlice, SourceConfig], Pieces]
    cut: Callable[[InputFile, int], Iterable[FileSlice]] = whole_file  # (file, bytes of a work unit) -> its slices
    compressible: bool = True  # as a whole file; not where reading starts in the middle
    version: int = 1  # raise it when the reader makes something else of the same file


def _read_nothing(slice_: FileSlice, _: SourceConfig) -> Pieces:
    yield SkippedRecord(NO_DATA, partial(str, slice_.file.path))


NO_DATA = "metadata of a Hugging Face dataset; include='*' reads its README, license and scripts too"
METADATA = "metadata"  # the format of files beside the data, which is found (hugging_face.py) and not given
TEXT = "text"  # the format of a file whose name has no known ending
FORMATS = {
    TEXT: FileFormat((".txt",), read_text),
    "jsonl": FileFormat((".jsonl", ".ndjson"), read_jsonl, cut=byte_ranges),
    "json": FileFormat((".json",), read_json),
    "csv": FileFormat((".csv",), read_csv, version=3),
    "tsv": FileFormat((".tsv",), read_csv, version=3),
    "parquet": FileFormat((".parquet",), read_parquet, cut=row_groups, compressible=False),
    "arrow": FileFormat((".arrow",), read_arrow, cut=record_batches, compressible=False),
    "html": FileFormat((".html", ".htm"), read_html),
    "warc": FileFormat((".warc",), read_warc),
    METADATA: FileFormat((), _read_nothing),
}


def format_of(name: str) -> str:
    """Return the format that a file's name tells, with the ending of a compression already removed."""
    return next((key for key, known in FORMATS.items() if name.lower().endswith(known.endings)), TEXT)


def read_slice(slice_: FileSlice, source: SourceConfig, *, strict: bool) -> Pieces:
    """Yield the pieces of a slice's documents, and the records that had to be skipped.

    Raises UserError for a file that cannot be read, and with `strict` for a record that cannot.
    """
    if slice_.start == slice_.end:
        yield SkippedRecord("empty", partial(str, slice_.file.path))
        return
    if source.split_text_at and slice_.start == 0 and slice_.file.kind not in (TEXT, METADATA):
        yield Note(f"split_text_at has no effect on {slice_.file.kind} files", partial(str, slice_.file.path))
    for piece in FORMATS[slice_.file.kind].read(slice_, source):
        if isinstance(piece, SkippedRecord) and strict and piece.reason not in ("empty", NO_DATA):
            raise UserError(f"{piece.where()}: {piece.reason}; repair it, or set strict=false to skip such records")
        yield piece
