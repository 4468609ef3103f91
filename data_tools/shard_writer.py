"""Shards and their index, written so that nothing half-written has a final name."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from megagpt.data_manifest import ShardInfo
from megagpt.files import make_durable, sha256_of, write_atomically
from megagpt.shards import HASH_BYTES, INDEX, INDEX_SCHEMA, ShardHeader, batch_crc32, document_schema, token_dtype

BATCH_TOKENS = 2**24  # per record batch: few batches to look up, a bounded buffer while writing


def narrow(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids in the shards' type, checked, because a cast would wrap a wrong one around in silence."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit a vocabulary of {vocab_size}")
    return ids.astype(token_dtype(vocab_size))


class ShardWriter:
    """One shard, document by document. The file has its name only once close() has made it whole."""

    def __init__(self, folder: Path, header: ShardHeader, *, batch_tokens: int = BATCH_TOKENS):
        self._header = header
        self._path = folder / header.path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_suffix(".tmp")
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, header.schema)
        self._batch_tokens = batch_tokens
        self._buffer: list[tuple[np.ndarray, bytes, int]] = []
        self._buffered = 0
        self._index: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray, doc: bytes, source: int) -> None:
        """A document: its ids with the end-of-document id last, its content hash, its source's number."""
        if tokens[-1] != self._header.eod_id:
            raise ValueError(f"document {doc.hex()} does not end in the end-of-document id {self._header.eod_id}")
        tokens = narrow(tokens, self._header.vocab_size)
        if self._buffered + len(tokens) > self._batch_tokens:
            self._flush()
        self._buffer.append((tokens, doc, source))
        self._buffered += len(tokens)

    def close(self) -> tuple[ShardInfo, list[dict[str, Any]]]:
        """What manifest and index say about this shard; row0 and tok0 count from the shard's start."""
        self._flush()
        self._writer.close()
        self._sink.close()
        make_durable(self._temporary, self._path)
        info = ShardInfo(
            path=self._header.path,
            bytes=self._path.stat().st_size,
            documents=sum(row["n_rows"] for row in self._index),
            tokens=sum(row["n_tokens"] for row in self._index),
            batches=len(self._index),
            sha256=sha256_of(self._path),
        )
        return info, self._index

    def _flush(self) -> None:
        if not self._buffer:
            return
        tokens, docs, sources = zip(*self._buffer, strict=True)
        columns = document_columns(tokens, docs, sources, self._header.dtype)
        batch = pa.record_batch(columns, schema=self._header.schema)
        crc32 = batch_crc32(batch)
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
                "crc32": crc32,
            }
        )
        self._writer.write_batch(batch, custom_metadata={"crc32": f"{crc32:08x}"})
        self._buffer, self._buffered = [], 0


def document_columns(
    tokens: Sequence[np.ndarray], docs: Sequence[bytes], sources: Sequence[int], dtype: Literal["uint16", "uint32"]
) -> list[pa.Array]:
    """The columns of `document_schema`; the ids must have its type already."""
    flat = np.concatenate([np.empty(0, dtype), *tokens])
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    buffers = [None, pa.py_buffer(b"".join(docs))]
    return [
        pa.LargeListArray.from_arrays(offsets, pa.array(flat), type=document_schema(dtype).field("tokens").type),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(docs), buffers),
        pa.array(sources, pa.uint16()),
    ]


def write_index(folder: Path, rows: list[dict[str, Any]]) -> str:
    """index.arrow from the shards' rows, in order; returns its sha256."""
    for previous, row in pairwise(rows):
        if previous["split"] == row["split"]:
            row["row0"] = previous["row0"] + previous["n_rows"]
            row["tok0"] = previous["tok0"] + previous["n_tokens"]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    write_atomically(folder / INDEX, sink.getvalue().to_pybytes())
    return sha256_of(folder / INDEX)
