"""Read tables (CSV, Parquet, Arrow): one document in each row."""

import csv
import inspect
import itertools
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord, pieces_of
from data_tools.readers.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of, lines
from data_tools.readers.input_file import FileSlice, InputFile
from data_tools.readers.open_file import open_arrow, open_bytes, open_parquet, reading
from megagpt.errors import UserError

MAX_FIELD = 2**27  # characters


def row_groups(file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    """Cut a Parquet file into its row groups."""
    with open_parquet(file) as parquet:
        for i in range(parquet.metadata.num_row_groups):
            yield FileSlice(file, i, i + 1, parquet.metadata.row_group(i).total_byte_size)


def record_batches(file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    """Cut an Arrow file into its record batches; a stream, such as Hugging Face datasets writes, is not cut."""
    with open_arrow(file) as reader:
        is_stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
        n_batches = 1 if is_stream else reader.num_record_batches
    for i in range(n_batches):
        yield FileSlice(file, i, i + 1, file.size // n_batches)


def read_csv(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of a CSV or TSV file with a header."""
    path = slice_.file.path
    csv.field_size_limit(MAX_FIELD)
    with open_bytes(slice_.file) as raw:
        head = raw.read(BLOCK)
        try:
            text = decoded(itertools.chain([head], blocks(raw)), encoding_of(head, source.encoding))
            rest = lines(text)
            rows = csv.DictReader(rest, delimiter="\t" if slice_.file.kind == "tsv" else ",")
            _check_is_whole(rest, rows.fieldnames, path)
            _check_column(path, rows.fieldnames or [], source)
            for number, row in enumerate(rows):
                _check_is_whole(rest, row, path)
                where = partial("{} row {}".format, path, number)
                yield from pieces_of(row[source.text_field], number, where, source.text_field)
        except NotTextError as problem:
            if problem.kind == "empty" and not slice_.file.named:
                yield SkippedRecord("empty", partial(str, path))
                return
            raise UserError(f"{path} is {problem}; {problem.way_out}") from problem
        except csv.Error as error:
            raise UserError(f"{path} is not CSV: {error}; repair it or leave it out") from error


def _check_is_whole(rest: Generator[str, None, None], row: object, path: str) -> None:
    """Raise UserError if the file ends within a quoted field, of which the csv module makes a row without an error.

    A row ends at the end of a line. If the lines have run out while one was being read, a quotation mark was open.
    """
    if row is not None and inspect.getgeneratorstate(rest) == inspect.GEN_CLOSED:
        raise UserError(f"{path} is truncated: it ends within a quoted field; repair it or leave it out")


def _check_column(path: str, columns: Any, source: SourceConfig) -> None:
    if source.text_field not in columns:
        named = ", ".join(columns) or "none"
        raise UserError(f"{path} has no column {source.text_field!r}; it has {named}; set text_field=NAME")


def read_parquet(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of one row group."""
    with open_parquet(slice_.file) as parquet:
        _check_column(slice_.file.path, parquet.schema_arrow.names, source)
        first = sum(parquet.metadata.row_group(i).num_rows for i in range(slice_.start))
        batches = parquet.iter_batches(128, row_groups=[slice_.start], columns=[source.text_field])
        yield from _read_batches(batches, slice_, source, first)


def read_arrow(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of one record batch, or of a whole stream."""
    with open_arrow(slice_.file) as reader:
        _check_column(slice_.file.path, reader.schema.names, source)
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            yield from _read_batches(iter(reader), slice_, source, 0)
        else:
            first = sum(reader.get_batch(i).num_rows for i in range(slice_.start))
            yield from _read_batches(iter([reader.get_batch(slice_.start)]), slice_, source, first)


def _read_batches(batches: Iterator[pa.RecordBatch], slice_: FileSlice, source: SourceConfig, row: int) -> Pieces:
    """Yield the text column of record batches; `row` is the number of the first row in the file."""
    path, field = slice_.file.path, source.text_field
    with reading(path):
        for batch in batches:
            try:
                # bytes, so that one value that is not UTF-8 does not fail its whole batch
                values = batch[field].cast(pa.large_binary())
            except pa.ArrowException as error:
                raise UserError(f"{path}: column {field!r} is not text: {error}; set text_field=NAME") from error
            for value in values:
                where = partial("{} row {}".format, path, row)
                try:
                    text = value.as_py().decode() if value.is_valid else None
                except UnicodeDecodeError:
                    yield SkippedRecord("not UTF-8", where)
                else:
                    yield from pieces_of(text, row, where, field)
                row += 1
