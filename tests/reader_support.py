"""Files in every format that the builder reads, and how the tests of its readers read them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from data_support import document

from data_tools.config import SourceConfig
from data_tools.readers.by_format import read_slice
from data_tools.readers.document_pieces import DocumentPiece, Pieces, SkippedRecord
from data_tools.readers.find_files import find_files
from data_tools.readers.open_file import zstd
from data_tools.readers.work_units import cut_into_units

TEXTS = [document(i, n_words=20) for i in range(20)]


def read_all(path: Path | str, *, strict: bool = False, **options: object) -> Pieces:
    source = SourceConfig(name="test", paths=(str(path),), **options)
    for unit in cut_into_units([(source.name, find_files(source))]):
        for slice_ in unit.slices:
            yield from read_slice(slice_, source, strict=strict)


def texts_of(items: Iterator[DocumentPiece | SkippedRecord]) -> list[str]:
    """The documents, joined from their pieces."""
    texts: list[str] = []
    for item in items:
        assert isinstance(item, DocumentPiece), item
        if item.is_first:
            texts.append("")
        texts[-1] += item.text
    return texts


def skipped(items: Pieces) -> list[SkippedRecord]:
    return [item for item in items if isinstance(item, SkippedRecord)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def csv(texts: list[str], separator: str = ",") -> bytes:
    rows = "".join(f'{i}{separator}"{text.replace(chr(34), chr(34) * 2)}"\r\n' for i, text in enumerate(texts))
    return f"id{separator}text\r\n{rows}".encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def arrow(texts: list[str], new: Callable = pa.ipc.new_file) -> bytes:
    table = pa.table({"text": texts})
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def arrow_stream(texts: list[str]) -> bytes:
    return arrow(texts, pa.ipc.new_stream)


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=1).encode()


def long_zst(texts: list[str], window_log: int = 28) -> bytes:
    """What `zstd --long=28` writes from a pipe: it may look back 256 MiB, more than decompressors allow by default."""
    options = {zstd.CompressionParameter.window_log: window_log}
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(jsonl(texts)) + compressor.flush()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "a.jsonl.zst": lambda texts: zstd.compress(jsonl(texts)),
    "long.jsonl.zst": long_zst,
    "a.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(jsonl(texts)),
    "two members.jsonl.gz": lambda texts: gzip.compress(jsonl(texts[:7])) + gzip.compress(jsonl(texts[7:])),
    "two frames.jsonl.zst": lambda texts: zstd.compress(jsonl(texts[:7])) + zstd.compress(jsonl(texts[7:])),
    "two streams.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts[:7])) + bz2.compress(jsonl(texts[7:])),
    "two streams.jsonl.xz": lambda texts: lzma.compress(jsonl(texts[:7])) + lzma.compress(jsonl(texts[7:])),
    "a.ndjson": jsonl,
    "array.json": json_array,
    "lines.json": jsonl,
    "array.json.gz": lambda texts: gzip.compress(json_array(texts)),
    "a.csv": csv,
    "a.csv.gz": lambda texts: gzip.compress(csv(texts)),
    "a.tsv": lambda texts: csv(texts, "\t"),
    "a.parquet": parquet,
    "file.arrow": arrow,
    "stream.arrow": arrow_stream,
}


FRENCH = "Voil\u00e0 l'\u00e9t\u00e9, o\u00f9 l'on go\u00fbte la cr\u00e8me br\u00fbl\u00e9e \u00e0 No\u00ebl. " * 20
