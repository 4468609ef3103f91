"""Slices of files to documents, each format by its reader."""

from collections.abc import Callable
from functools import partial

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import Items, Skipped
from data_tools.readers.jsonl import read_json, read_jsonl
from data_tools.readers.plain_text import read_text
from data_tools.readers.tables import read_arrow, read_csv, read_parquet
from data_tools.readers.web import read_html, read_warc
from data_tools.readers.work_units import Slice
from megagpt.errors import UserError

READERS: dict[str, Callable[[Slice, SourceConfig], Items]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "html": read_html,
    "warc": read_warc,
}


def read_slice(part: Slice, source: SourceConfig, *, strict: bool) -> Items:
    """What is in a slice. Raises UserError for a file that cannot be read, and with `strict` for a record."""
    if part.start == part.end:
        yield Skipped("empty", partial(str, part.file.path))
        return
    for item in READERS[part.file.kind](part, source):
        if isinstance(item, Skipped) and strict and item.reason != "empty":
            raise UserError(f"{item.where()}: {item.reason}; repair it, or set strict=false to skip such records")
        yield item
