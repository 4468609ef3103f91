"""Store the cleaned documents of a work unit between reading and tokenizing, in two files.

.texts.arrow       document: uint32, text: large_string    one row per piece: its document's row below, its text
.documents.arrow   doc, bytes, slice, position, kept       one row per document: its content hash, its size in UTF-8,
                                                           where it came from, and whether it was read to its end

Everywhere in data_tools, a document's `row` is its row in .documents.arrow of its unit.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_tools.executor.progress import advance
from data_tools.executor.tasks import file_of
from data_tools.storage.arrow_columns import hash_column, new_arrow_file, number_column, string_column
from megagpt.data.shard_format import HASH_BYTES

BATCH_BYTES, BATCH_ROWS = 2**24, 2**16  # limits of a record batch, and so of what is buffered in memory
PIECES = pa.schema({"document": pa.uint32(), "text": pa.large_string()})
DOCUMENTS = pa.schema(
    {
        "doc": pa.binary(HASH_BYTES),
        "bytes": pa.uint64(),
        "slice": pa.uint32(),  # number of the slice in its unit
        "position": pa.uint64(),
        "kept": pa.bool_(),
    }
)


class DocumentInfo(NamedTuple):
    """A row of .documents.arrow."""

    doc: bytes  # content hash
    bytes: int
    slice: int
    position: int
    kept: bool  # False if the rest of it could not be read


class DocumentWriter:
    """Write documents piece by piece: begin(), add() for each piece, end(). Opened by open_documents()."""

    def __init__(self, texts: pa.ipc.RecordBatchFileWriter, documents: pa.ipc.RecordBatchFileWriter) -> None:
        self._texts_sink, self._documents_sink = texts, documents
        self._rows: list[int] = []  # for each buffered piece, its document's row
        self._texts: list[bytes] = []
        self._buffered = 0
        self._documents: list[DocumentInfo] = []
        self._written = 0  # documents that are in the file already
        self._content = hashlib.blake2b(digest_size=HASH_BYTES)  # of the document being written
        self._kept_hashes = hashlib.sha256()
        self.kept = self.kept_bytes = 0  # documents that stay, and their bytes
        self.is_open = False  # within a document
        self.size = 0  # bytes so far of the document being written

    @property
    def sha256(self) -> str:
        """The hash over the content hashes of the documents that stay, in order."""
        return self._kept_hashes.hexdigest()

    def begin(self) -> None:
        """Start a document."""
        self._content = hashlib.blake2b(digest_size=HASH_BYTES)
        self.size, self.is_open = 0, True

    def add(self, text: str) -> None:
        """Write the next piece of the document."""
        data = text.encode()
        self._content.update(data)
        self._rows.append(self._written + len(self._documents))
        self._texts.append(data)
        self.size += len(data)
        self._buffered += len(data)
        if self._buffered >= BATCH_BYTES or len(self._texts) >= BATCH_ROWS:
            self._flush_texts()

    def end(self, slice_: int, position: int, *, kept: bool = True) -> None:
        """End the document; kept=False drops it, where the rest of it could not be read."""
        doc = self._content.digest()
        self._documents.append(DocumentInfo(doc, self.size, slice_, position, kept))
        self.is_open = False
        if kept:
            self.kept += 1
            self.kept_bytes += self.size
            self._kept_hashes.update(doc)
        if len(self._documents) >= BATCH_ROWS:
            self._flush_documents()

    def flush(self) -> None:
        """Write what is buffered."""
        self._flush_texts()
        self._flush_documents()

    def _flush_texts(self) -> None:
        if self._texts:
            columns = [number_column(self._rows, pa.uint32()), string_column(self._texts, pa.large_string())]
            self._texts_sink.write_batch(pa.record_batch(columns, schema=PIECES))
            self._rows, self._texts, self._buffered = [], [], 0

    def _flush_documents(self) -> None:
        if documents := self._documents:
            columns = [
                hash_column([document.doc for document in documents], HASH_BYTES),
                number_column([document.bytes for document in documents], pa.uint64()),
                number_column([document.slice for document in documents], pa.uint32()),
                number_column([document.position for document in documents], pa.uint64()),
                number_column([document.kept for document in documents], pa.bool_()),
            ]
            self._documents_sink.write_batch(pa.record_batch(columns, schema=DOCUMENTS))
            self._written += len(documents)
            self._documents = []


@contextmanager
def open_documents(prefix: Path) -> Iterator[DocumentWriter]:
    """Open a writer of the two files, which get their names only when the block ends without an error."""
    texts, documents = file_of(prefix, ".texts.arrow"), file_of(prefix, ".documents.arrow")
    with new_arrow_file(texts, PIECES) as texts_sink, new_arrow_file(documents, DOCUMENTS) as documents_sink:
        writer = DocumentWriter(texts_sink, documents_sink)
        yield writer
        writer.flush()


def read_pieces(prefix: Path) -> Iterator[tuple[int, str]]:
    """Yield (document's row, piece) in order, with one record batch in memory at a time."""
    with pa.memory_map(str(file_of(prefix, ".texts.arrow"))) as file:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            sizes = pc.binary_length(batch["text"]).to_pylist()
            for row, text, size in zip(batch["document"].to_pylist(), batch["text"].to_pylist(), sizes, strict=True):
                yield row, text
                advance(size)


def read_documents(prefix: Path) -> list[DocumentInfo]:
    """Return the rows of .documents.arrow."""
    with pa.memory_map(str(file_of(prefix, ".documents.arrow"))) as file:
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return [
            DocumentInfo(*row)
            for batch in batches
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        ]
