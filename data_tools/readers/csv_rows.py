"""Read CSV and TSV: one document in each row that has as many fields as the header."""

import csv
import itertools
from collections.abc import Iterator
from functools import partial

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord, pieces_of
from data_tools.readers.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of, lines
from data_tools.readers.fields import check_column
from data_tools.readers.input_file import FileSlice, UnreadableFile
from data_tools.readers.open_file import open_bytes

MAX_FIELD = 2**27  # characters
SEPARATORS = {"csv": ",;\t|", "tsv": "\t"}  # tried in this order: spreadsheets write semicolons where 1,5 is a number
DOES_NOT_FIT = "a row with more or fewer fields than the header"
NO_ROW = "not CSV: a quotation mark within a field, or a line break"


def read_csv(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of a CSV or TSV file with a header."""
    path, field = slice_.file.path, source.text_field
    csv.field_size_limit(MAX_FIELD)
    with open_bytes(slice_.file) as raw:
        head = raw.read(BLOCK)
        try:
            rest = lines(decoded(itertools.chain([head], blocks(raw)), encoding_of(head, source.encoding)))
            first_line = next((line for line in rest if not line.isspace()), "")
            separator = _separator(first_line, slice_.file.kind, field)
            rows = _rows(itertools.chain([first_line], rest), separator, path)
            header = _stripped(next(rows, []), path, field)
            check_column(path, header, field)
            column = header.index(field)
            for number, row in enumerate(rows):
                where = partial("{} row {}".format, path, number)
                if row is None or len(row) != len(header):
                    yield SkippedRecord(NO_ROW if row is None else DOES_NOT_FIT, where)
                else:
                    yield from pieces_of(row[column], number, where, field)
        except NotTextError as problem:
            if problem.kind == "empty" and not slice_.file.named:
                yield SkippedRecord("empty", partial(str, path))
                return
            raise UnreadableFile(f"{path} is {problem}; {problem.way_out}") from problem


def _separator(first_line: str, kind: str, field: str) -> str:
    """Return the separator by which the header has the text column, or the format's own."""
    names = {separator: [name.strip() for name in _header(first_line, separator)] for separator in SEPARATORS[kind]}
    return next((separator for separator in names if field.strip() in names[separator]), SEPARATORS[kind][0])


def _header(first_line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([first_line], delimiter=separator), [])
    except csv.Error:
        return []


def _stripped(header: list[str] | None, path: str, field: str) -> list[str]:
    """Return the names of the columns, without the blanks around them unless the text column's name has some."""
    if header is None:
        raise UnreadableFile(f"{path} is {NO_ROW}, in its first line, which names the columns; repair it")
    return header if field in header else [name.strip() for name in header]


def _rows(lines_: Iterator[str], separator: str, path: str) -> Iterator[list[str] | None]:
    """Yield the header and each row that is not blank, or None for one that cannot be read.

    Raises UnreadableFile if the file ends within a quoted field.
    """
    # strict: without it, the csv module makes `a b"` of "a" b" and does not tell
    reader = csv.reader(lines_, delimiter=separator, strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error).startswith(("unexpected end", "field larger")):
                problem = f"is truncated, or lacks a quotation mark: a field opened in line {first_line} does not end"
                raise UnreadableFile(f"{path} {problem}; repair it or leave it out") from error
            yield None  # reading continues with the next line
        else:
            if row:
                yield row
