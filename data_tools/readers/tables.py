"""Tables: CSV, Parquet and Arrow, one document in each row."""

import csv
import inspect
import itertools
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Items, Skipped, pieces_of
from data_tools.readers.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of, lines
from data_tools.readers.open_file import open_arrow, open_bytes, open_parquet, reading
from data_tools.readers.work_units import Slice
from megagpt.errors import UserError

MAX_FIELD = 2**27  # characters


def read_csv(part: Slice, source: SourceConfig) -> Items:
    path = part.file.path
    csv.field_size_limit(MAX_FIELD)
    with open_bytes(part.file) as raw:
        head = raw.read(BLOCK)
        try:
            text = decoded(itertools.chain([head], blocks(raw)), encoding_of(head, source.encoding))
            rest = lines(text)
            rows = csv.DictReader(rest, delimiter="\t" if part.file.kind == "tsv" else ",")
            _check_is_whole(rest, rows.fieldnames, path)
            _check_column(path, rows.fieldnames or [], source)
            for number, row in enumerate(rows):
                _check_is_whole(rest, row, path)
                where = partial("{} row {}".format, path, number)
                yield from pieces_of(row[source.text_field], number, where, source.text_field)
        except NotTextError as problem:
            if problem.kind == "empty" and not part.file.named:
                yield Skipped("empty", partial(str, path))
                return
            raise UserError(f"{path} is {problem}; {problem.way_out}") from problem
        except csv.Error as error:
            raise UserError(f"{path} is no CSV: {error}; repair it or leave it out") from error


def _check_is_whole(rest: Generator[str, None, None], row: object, path: str) -> None:
    """A row is made of whole lines, so if they have ended before it did, that was within quotation marks."""
    if row is not None and inspect.getgeneratorstate(rest) == inspect.GEN_CLOSED:
        raise UserError(f"{path} ends within a quoted field, so it was cut off; repair it or leave it out")


def _check_column(path: str, columns: Any, source: SourceConfig) -> None:
    if source.text_field not in columns:
        named = ", ".join(columns) or "none"
        raise UserError(f"{path} has no column {source.text_field!r}; it has {named}; set text_field=NAME")


def read_parquet(part: Slice, source: SourceConfig) -> Items:
    with open_parquet(part.file) as parquet:
        _check_column(part.file.path, parquet.schema_arrow.names, source)
        first = sum(parquet.metadata.row_group(i).num_rows for i in range(part.start))
        batches = parquet.iter_batches(128, row_groups=[part.start], columns=[source.text_field])
        yield from _read_batches(batches, part, source, first)


def read_arrow(part: Slice, source: SourceConfig) -> Items:
    with open_arrow(part.file) as reader:
        _check_column(part.file.path, reader.schema.names, source)
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            yield from _read_batches(iter(reader), part, source, 0)
        else:
            first = sum(reader.get_batch(i).num_rows for i in range(part.start))
            yield from _read_batches(iter([reader.get_batch(part.start)]), part, source, first)


def _read_batches(batches: Iterator[pa.RecordBatch], part: Slice, source: SourceConfig, row: int) -> Items:
    path, field = part.file.path, source.text_field
    with reading(path):
        for batch in batches:
            try:
                values = batch[field].cast(pa.large_binary())
            except pa.ArrowException as error:
                raise UserError(f"{path}: column {field!r} cannot be read as text: {error}") from error
            for value in values:
                where = partial("{} row {}".format, path, row)
                try:
                    text = value.as_py().decode() if value.is_valid else None
                except UnicodeDecodeError:
                    yield Skipped("not UTF-8", where)
                else:
                    yield from pieces_of(text, row, where, field)
                row += 1
