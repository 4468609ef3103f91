"""Read CSV and TSV: one document in each row that has as many fields as the header."""

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Pieces, SkippedRecord, pieces_of
from data_tools.readers.formats.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of, lines
from data_tools.readers.formats.fields import check_column
from data_tools.readers.input_file import FileSlice, UnreadableFile
from data_tools.readers.open_file import open_bytes

SEP_LINE = re.compile(r'"?sep=([,;|\t])"?[\r\n]*')
MAX_FIELD = 2**27  # characters
SEPARATORS = {"csv": ",;\t|", "tsv": "\t"}  # tried in this order: spreadsheets write semicolons where 1,5 is a number
DOES_NOT_FIT = "a row with more or fewer fields than the header"
NO_ROW = "not CSV: a quotation mark within a quoted field, or a line break"
ESCAPED = 'a quoted field ends in a backslash, which may be meant to escape the quotation mark: CSV doubles it, ""'
SWALLOWED = "a quoted field of lines that look like rows of their own: perhaps quotation marks are letters in this file"

Row = list[str] | str
"""The fields of a row, or why it is none."""


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
            if given := SEP_LINE.fullmatch(first_line):  # for Excel alone, above the names of the columns
                separator, first_line = given[1], next(rest, "")
            rows = _rows(itertools.chain([first_line], rest), separator, path)
            header = _stripped(next(rows, []), path, field)
            check_column(path, header, field)
            column = header.index(field)
            for number, row in enumerate(rows):
                where = partial("{} row {}".format, path, number)
                if isinstance(row, str) or len(row) != len(header):
                    yield SkippedRecord(row if isinstance(row, str) else DOES_NOT_FIT, where)
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


def _stripped(header: Row, path: str, field: str) -> list[str]:
    """Return the names of the columns, without the blanks around them unless the text column's name has some."""
    if isinstance(header, str):
        raise UnreadableFile(f"{path}: {header}, in its first line, which names the columns; repair it")
    return header if field in header else [name.strip() for name in header]


def _rows(lines_: Iterator[str], separator: str, path: str) -> Iterator[Row]:
    """Yield the header and each row that is not blank, or the reason for each line of one that cannot be read.

    Raises UnreadableFile if the file ends within a quoted field.
    """
    record: list[str] = []  # the lines of the row that is being read
    # strict: without it, the csv module makes `a b"` of "a" b" and does not tell
    reader = csv.reader(_kept(lines_, record), delimiter=separator, strict=True)
    first_line, n_tabs = 1, 0
    while True:
        n_lines: int | None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = str(error).startswith(("unexpected end", "field larger"))
            n_lines = None if is_open else _lines_of_broken(record, lines_, separator)
            if n_lines is None:
                problem = f"is truncated, or lacks a quotation mark: a field opened in line {first_line} does not end"
                raise UnreadableFile(f"{path} {problem}; repair it or leave it out") from error
            yield from [NO_ROW] * n_lines
        else:
            n_lines = len(record)
            n_tabs = n_tabs or record[0].count("\t")
            if reason := _ambiguity(record, separator, n_tabs):
                # each line may have been a row
                yield from [reason] * n_lines
            elif row:
                yield row
        first_line += n_lines
        record.clear()


def _kept(lines_: Iterator[str], record: list[str]) -> Iterator[str]:
    for line in lines_:
        record.append(line)
        yield line


def _ambiguity(record: Sequence[str], separator: str, n_tabs: int) -> str | None:
    """Return why a row may mean something else to the program that wrote it, or None."""
    end = rf"(?=[{separator}\r\n]|$)"
    if any('\\"' in line and re.search(r'(?<!\\)(?:\\\\)*\\"' + end, line) for line in record):
        return ESCAPED
    # many programs that write TSV do not quote, so that a text may begin with a quotation mark, and a later one end so
    if separator == "\t" and len(record) > 1 and n_tabs and all(line.count("\t") == n_tabs for line in record):
        return SWALLOWED
    return None


def _lines_of_broken(record: Sequence[str], rest: Iterator[str], separator: str) -> int | None:
    """Return how many lines a row with an error has, after reading the rest of it; None if the file ends in it.

    It ends with the line in which its quoted field ends, or that makes the number of quotation marks even.
    """
    is_open, quotes = False, 0
    for n_lines, line in enumerate(itertools.chain(record, rest), start=1):
        is_open = _ends_in_quotes(line, separator, is_open)
        quotes += line.count('"')
        if n_lines >= len(record) and (not is_open or quotes % 2 == 0):
            return n_lines
    return None


def _ends_in_quotes(line: str, separator: str, is_open: bool) -> bool:
    """Tell whether a line ends within a quoted field. A quotation mark in the midst of a field counts as a letter."""
    opening, closing = rf'(?:^|[{separator}])"', rf'"(?=[{separator}\r\n]|$)'
    at = 0
    while found := re.compile(closing if is_open else opening).search(line, at):
        at, is_open = found.end(), not is_open
    return is_open
