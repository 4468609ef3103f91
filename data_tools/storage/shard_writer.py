"""Write shards and their index so that a file with its final name is always complete."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_tools.storage.arrow_columns import hash_column, number_column, string_column, to_arrow
from megagpt.atomic_files import make_durable, sha256_of, temporary_name, write_atomically
from megagpt.data.manifest import ShardInfo
from megagpt.data.shard_format import HASH_BYTES, INDEX_SCHEMA, ShardHeader, batch_xxh3, document_schema, token_dtype

BATCH_TOKENS = 2**24  # per record batch: few batches to search, a small buffer while writing


def narrow(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Cast ids to the shards' type. Raises ValueError for one outside the vocabulary, as a cast would wrap it."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}")
    return ids.astype(token_dtype(vocab_size), copy=False)


class ShardRow(NamedTuple):
    """A row of a shard: a document, or a part of a long one."""

    tokens: np.ndarray
    doc: bytes  # content hash of the document
    source: int
    part: int = 0  # number of the part in its document
    is_last: bool = True  # of its document: the last token is the end-of-document id


class ShardWriter:
    """Write one shard row by row. The file gets its final name in close(), when it is complete."""

    def __init__(self, path: Path, header: ShardHeader, *, batch_tokens: int = BATCH_TOKENS):
        self._header = header
        self._path = path
        self._temporary = temporary_name(path)
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, header.schema)
        self._batch_tokens = batch_tokens
        self._buffer: list[ShardRow] = []
        self._buffered = 0
        self._documents = 0
        self._index: list[dict[str, Any]] = []

    def add(self, row: ShardRow) -> None:
        """Append a row. Raises ValueError for a document that does not end in the end-of-document id."""
        if row.is_last and row.tokens[-1] != self._header.eod_id:
            raise ValueError(f"document {row.doc.hex()} does not end in the end-of-document id {self._header.eod_id}")
        if self._buffered + len(row.tokens) > self._batch_tokens:
            self.flush()
        self._buffer.append(row)
        self._buffered += len(row.tokens)
        self._documents += row.is_last

    def close(self) -> tuple[ShardInfo, list[dict[str, Any]]]:
        """Complete the file; returns its entries for the manifest and the index (counted from the shard's start)."""
        self.flush()
        self._writer.close()
        self._sink.close()
        make_durable(self._temporary, self._path)
        info = ShardInfo(
            path=self._header.path,
            bytes=self._path.stat().st_size,
            documents=self._documents,
            tokens=sum(row["n_tokens"] for row in self._index),
            batches=len(self._index),
            sha256=sha256_of(self._path),
        )
        return info, self._index

    def flush(self) -> None:
        """Write the buffered rows as a record batch."""
        if not self._buffer:
            return
        batch = pa.record_batch(document_columns(self._buffer, self._header.vocab_size), schema=self._header.schema)
        xxh3 = batch_xxh3(batch)
        last = self._index[-1] if self._index else None
        self._index.append(
            {
                "split": self._header.split,
                "variant": self._header.variant,
                "shard": self._header.shard,
                "batch": len(self._index),
                "row0": last["row0"] + last["n_rows"] if last else 0,
                "tok0": last["tok0"] + last["n_tokens"] if last else 0,
                "n_rows": len(batch),
                "n_tokens": self._buffered,
                "byte_offset": self._sink.tell(),
                "xxh3": xxh3,
            }
        )
        self._writer.write_batch(batch, custom_metadata={"xxh3": f"{xxh3:016x}"})
        self._buffer, self._buffered = [], 0


def document_columns(rows: Sequence[ShardRow], vocab_size: int) -> list[pa.Array]:
    """Rows as the columns of `document_schema`. Raises ValueError for an id outside the vocabulary."""
    dtype = token_dtype(vocab_size)
    flat = narrow(np.concatenate([np.empty(0, dtype), *(row.tokens for row in rows)]), vocab_size)
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int64)
    return [
        pa.LargeListArray.from_arrays(
            to_arrow(offsets), to_arrow(flat), type=document_schema(dtype).field("tokens").type
        ),
        hash_column([row.doc for row in rows], HASH_BYTES),
        number_column([row.source for row in rows], pa.uint16()),
        number_column([row.part for row in rows], pa.uint32()),
    ]


def write_index(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write index.arrow from the shards' index rows, in order; returns its sha256."""
    # each shard counted from its own start: continue from the shard before in the same split
    for previous, row in pairwise(rows):
        if (previous["split"], previous["variant"]) == (row["split"], row["variant"]):
            row["row0"] = previous["row0"] + previous["n_rows"]
            row["tok0"] = previous["tok0"] + previous["n_tokens"]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        splits = string_column([row["split"].encode() for row in rows], pa.string())
        rest = [number_column([row[field.name] for row in rows], field.type) for field in list(INDEX_SCHEMA)[1:]]
        writer.write_batch(pa.record_batch([splits, *rest], schema=INDEX_SCHEMA))
    write_atomically(path, sink.getvalue().to_pybytes())
    return sha256_of(path)
