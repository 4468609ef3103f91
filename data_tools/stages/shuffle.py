"""Merge token files into shuffled shards: each shard takes a range of keys from every token file, in order of key.

Keys are uniform hashes, so shards have similar sizes, and the documents of a split are shuffled as a whole. Three
limits bound what a task needs. It sorts its range of keys in passes, each of a part of the range. It copies the rows of
a pass in batches of about PASS_TOKENS: all rows of a long document have the same key, so a pass may have any number of
tokens. And it maps at most MERGE_FILES token files: more are first merged into fewer, so that work grows no faster than
the corpus.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.executor.progress import advance
from data_tools.executor.tasks import Tasks, file_of, read_list, write_list
from data_tools.storage.arrow_columns import hash_column, new_arrow_file, number_column, string_column
from data_tools.storage.shard_writer import BATCH_TOKENS, ShardWriter
from data_tools.storage.token_files import (
    BYTES_TYPE,
    PASS_TOKENS,
    KeyedRow,
    TokenFile,
    count_tokens,
    have_bytes,
    sorted_rows,
    token_batch,
    token_file_schema,
)
from megagpt.atomic_files import make_durable, sha256_of, temporary_name
from megagpt.data.manifest import Split
from megagpt.data.provenance import BYTES
from megagpt.data.shard_format import HASH_BYTES, ShardHeader

SHARD, PROVENANCE = ".arrow", ".parquet"
MERGED = ".merged.arrow"
MERGE_FILES = 2**11  # to map at a time; with more, a pass would take longer to open them than to copy its tokens
ROW_GROUP = 2**16  # rows, of the provenance file
PROVENANCE_COLUMNS = {
    "doc": pa.binary(HASH_BYTES),
    "part": pa.uint32(),
    "source": pa.uint16(),
    "file": pa.dictionary(pa.int32(), pa.string()),
    "position": pa.uint64(),
}


def write_shard(prefix: Path, header: ShardHeader, n_shards: int, n_passes: int, listed: Path) -> dict[str, Any]:
    """Run as a task: write shard `header.shard` of the n_shards of its split, and its provenance file, row for row.

    `listed` is the list of token files. The result has the shard's entries in the manifest and the index.
    """
    files = [TokenFile(*fields) for fields in read_list(listed)]
    writer = ShardWriter(file_of(prefix, SHARD), header)
    provenance = _Provenance(file_of(prefix, PROVENANCE), with_bytes=have_bytes(prefix.parents[1], files))
    for step in range(header.shard * n_passes, (header.shard + 1) * n_passes):
        for rows in sorted_rows(prefix.parents[1], files, _keys(step, n_shards * n_passes), header.split):
            for number, (_, row, slice_, position, n_bytes) in rows:
                writer.add(row)
                advance(len(row.tokens))
                provenance.add(row.doc, row.part, row.source, files[number].inputs[slice_], position, n_bytes)
            # before the maps are released, because the buffered tokens are views of them
            writer.flush()
    info, index = writer.close()
    return {"info": info.model_dump(), "index": index, "provenance_sha256": provenance.close()}


def _keys(step: int, n_steps: int) -> range:
    """Return one of n_steps equal ranges of keys."""
    return range(2**64 * step // n_steps, 2**64 * (step + 1) // n_steps)


def merge_down(files: list[TokenFile], split: Split, vocab_size: int, tasks: Tasks) -> list[TokenFile]:
    """Return at most MERGE_FILES token files with the same rows of the split in the same order."""
    while len(files) > MERGE_FILES:
        groups = [files[i : i + MERGE_FILES] for i in range(0, len(files), MERGE_FILES)]
        lists = tasks.run(write_list, [([file.as_json() for file in group],) for group in groups], "listing")
        merged = tasks.run(merge_group, [(listed.prefix, split, vocab_size) for listed in lists], "merging")
        files = [
            TokenFile(
                path=str(file_of(done.prefix, MERGED).relative_to(tasks.folder)),
                inputs=[path for file in group for path in file.inputs],
                last_keys=done.result["last_keys"],
            )
            for group, done in zip(groups, merged, strict=True)
        ]
    return files


def merge_group(prefix: Path, listed: Path, split: Split, vocab_size: int) -> dict[str, Any]:
    """Run as a task: write the rows of one split of the listed token files into one file."""
    files, folder = [TokenFile(*fields) for fields in read_list(listed)], prefix.parents[1]
    first_slices = list(accumulate((len(file.inputs) for file in files), initial=0))
    n_passes = -(-count_tokens(folder, files, split) // PASS_TOKENS)
    last_keys = []
    with_bytes = have_bytes(folder, files)
    with new_arrow_file(file_of(prefix, MERGED), token_file_schema(vocab_size, with_bytes=with_bytes)) as sink:
        for step in range(n_passes):
            for rows in sorted_rows(folder, files, _keys(step, n_passes), split):
                merged = (row._replace(slice=first_slices[number] + row.slice) for number, row in rows)
                for batch in _batches(merged):
                    sink.write_batch(token_batch(batch, vocab_size, with_bytes=with_bytes))
                    last_keys.append(batch[-1].key)
    return {"last_keys": last_keys}


def _batches(rows: Iterable[KeyedRow]) -> Iterator[Sequence[KeyedRow]]:
    """Group rows by about BATCH_TOKENS."""
    batch: list[KeyedRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.row.tokens)
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Provenance:
    """Writes where each row of a shard came from, as a Parquet file with the same number of rows."""

    def __init__(self, path: Path, *, with_bytes: bool) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._schema = pa.schema(PROVENANCE_COLUMNS | ({BYTES: BYTES_TYPE} if with_bytes else {}))
        self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        self._rows: list[tuple[bytes, int, int, str, int, int]] = []

    def add(self, doc: bytes, part: int, source: int, file: str, position: int, n_bytes: int) -> None:
        self._rows.append((doc, part, source, file, position, n_bytes))
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> str:
        """Complete the file; returns its sha256."""
        self._flush()
        self._writer.close()
        make_durable(self._temporary, self._path)
        return sha256_of(self._path)

    def _flush(self) -> None:
        if self._rows:
            docs, parts, sources, files, positions, n_bytes = zip(*self._rows, strict=True)
            codes = {file: code for code, file in enumerate(dict.fromkeys(files))}
            names = string_column([file.encode() for file in codes], pa.string())
            columns = [
                hash_column(docs, HASH_BYTES),
                number_column(parts, pa.uint32()),
                number_column(sources, pa.uint16()),
                pa.DictionaryArray.from_arrays(number_column([codes[file] for file in files], pa.int32()), names),
                number_column(positions, pa.uint64()),
                number_column(n_bytes, BYTES_TYPE),
            ]
            self._writer.write_batch(pa.record_batch(columns[: len(self._schema)], schema=self._schema))
            self._rows = []
