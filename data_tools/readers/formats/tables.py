"""Read Parquet and Arrow: one document in each row."""

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord
from data_tools.readers.formats.fields import check_column, read_record, splits_of
from data_tools.readers.input_file import FileSlice, InputFile, UnreadableFile
from data_tools.readers.open_file import open_arrow, open_parquet, reading


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


def read_parquet(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of one row group."""
    with open_parquet(slice_.file) as parquet:
        column = _column_of(slice_.file.path, parquet.schema_arrow.names, source)
        first = sum(parquet.metadata.row_group(i).num_rows for i in range(slice_.start))
        batches = parquet.iter_batches(128, row_groups=[slice_.start], columns=[column])
        yield from _read_batches(batches, column, slice_, source, first)


def read_arrow(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of one record batch, or of a whole stream."""
    with open_arrow(slice_.file) as reader:
        column = _column_of(slice_.file.path, reader.schema.names, source)
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            yield from _read_batches(iter(reader), column, slice_, source, 0)
        else:
            first = sum(reader.get_batch(i).num_rows for i in range(slice_.start))
            yield from _read_batches(iter([reader.get_batch(slice_.start)]), column, slice_, source, first)


def _column_of(path: str, columns: Sequence[str], source: SourceConfig) -> str:
    """Return the column that holds the text, itself or nested in it. Raises UnreadableFile if there is none."""
    heads = (head for head, _ in splits_of(source.text_field) if head in columns)
    column = source.text_field if source.text_field in columns else next(heads, source.text_field)
    check_column(path, columns, column)
    return column


def _read_batches(
    batches: Iterator[pa.RecordBatch], column: str, slice_: FileSlice, source: SourceConfig, row: int
) -> Pieces:
    """Yield the texts of record batches; `row` is the number of the first row in the file."""
    path = slice_.file.path
    with reading(path):
        for batch in batches:
            values = _plain(batch[column])
            is_nested = pa.types.is_nested(values.type)
            if not is_nested:
                values = _as_bytes(values, path, column)
            for value in values:
                where = partial("{} row {}".format, path, row)
                try:
                    # the Python value of nested text is a str already
                    content = value.as_py() if is_nested or not value.is_valid else value.as_py().decode()
                except UnicodeDecodeError:
                    yield SkippedRecord("not UTF-8", where)
                except ValueError as error:
                    raise UnreadableFile(f"{path}: column {column!r}: {error}; rename all but one of them") from error
                else:
                    yield from read_record({column: content}, source, row, where)
                row += 1


def _plain(values: pa.Array) -> pa.Array:
    """Return the values of a run-end-encoded or extension array as an array of their own type."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    return pc.run_end_decode(values) if pa.types.is_run_end_encoded(values.type) else values


def _as_bytes(values: pa.Array, path: str, column: str) -> pa.Array:
    """Return text as bytes, so that one value that is not UTF-8 does not fail its whole batch."""
    try:
        return values.cast(pa.large_binary())
    except pa.ArrowException as error:
        raise UnreadableFile(f"{path}: column {column!r} is not text: {error}; set text_field=NAME") from error
