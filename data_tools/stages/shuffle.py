"""Merge token files into shuffled shards: each shard takes a range of keys from every token file, in order of key.

Keys are uniform hashes, so shards have similar sizes, and the documents of a split are shuffled as a whole. Two limits
bound the memory of a task. It sorts its range of keys in passes, each of a part of the range. And it copies the rows
of a pass in batches of about PASS_TOKENS, with new memory maps for each: all rows of a long document have the same key,
so a pass may have any number of tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.executor.tasks import file_of, read_list
from data_tools.storage.arrow_columns import hash_column, number_column, string_column, to_numpy
from data_tools.storage.shard_writer import ShardRow, ShardWriter
from megagpt.atomic_files import make_durable, sha256_of, temporary_name
from megagpt.data.manifest import SPLITS, Split
from megagpt.data.shard_format import HASH_BYTES, ShardHeader

SHARD, PROVENANCE = ".arrow", ".parquet"
PASS_TOKENS = 2**26
ROW_GROUP = 2**16  # rows, of the provenance file
PROVENANCE_COLUMNS = {
    "doc": pa.binary(HASH_BYTES),
    "part": pa.uint32(),
    "source": pa.uint16(),
    "file": pa.dictionary(pa.int32(), pa.string()),
    "position": pa.uint64(),
}


class RowRange(NamedTuple):
    """The rows of one token file in a range of keys, as views of its memory map; one array per column."""

    key: np.ndarray
    part: np.ndarray  # number of the row in its document
    offsets: np.ndarray  # (rows + 1,), into tokens
    tokens: np.ndarray
    docs: np.ndarray  # (rows, 16) bytes
    source: np.ndarray
    is_last: np.ndarray
    slice: np.ndarray
    position: np.ndarray


def write_shard(prefix: Path, header: ShardHeader, n_shards: int, n_passes: int, listed: Path) -> dict[str, Any]:
    """Run as a task: write shard `header.shard` of the n_shards of its split, and its provenance file, row for row.

    `listed` is the list of (token file below the scratch folder, input file of each of its slices). The result has the
    shard's entries in the manifest and the index.
    """
    token_files = read_list(listed)
    writer = ShardWriter(file_of(prefix, SHARD), header)
    provenance = _Provenance(file_of(prefix, PROVENANCE))
    for step in range(header.shard * n_passes, (header.shard + 1) * n_passes):
        keys = range(2**64 * step // (n_shards * n_passes), 2**64 * (step + 1) // (n_shards * n_passes))
        opened = partial(_opened, prefix.parents[1], [name for name, _ in token_files], keys, header.split)
        with opened() as ranges:
            order = _in_order(ranges)
        for batch in order:
            # new maps, to release the pages that the batch before has read
            with opened() as ranges:
                for number, i in batch.tolist():
                    rows, inputs = ranges[number], token_files[number][1]
                    doc, part, source = rows.docs[i].tobytes(), int(rows.part[i]), int(rows.source[i])
                    tokens = rows.tokens[rows.offsets[i] : rows.offsets[i + 1]]
                    writer.add(ShardRow(tokens, doc, source, part, bool(rows.is_last[i])))
                    provenance.add(doc, part, source, inputs[rows.slice[i]], int(rows.position[i]))
                # before the maps are closed, because the buffered tokens are views of them
                writer.flush()
    info, index = writer.close()
    return {"info": info.model_dump(), "index": index, "provenance_sha256": provenance.close()}


@contextmanager
def _opened(folder: Path, names: Sequence[str], keys: range, split: Split) -> Iterator[list[RowRange]]:
    """Map each token file and find its rows in the range of keys; tokens are read only when they are accessed."""
    with ExitStack() as opened:
        maps = [opened.enter_context(pa.memory_map(str(folder / name))) for name in names]
        yield [_rows_between(keys[0], keys[-1], file, split) for file in maps]


def _rows_between(low: int, high: int, file: pa.MemoryMappedFile, split: Split) -> RowRange:
    """Return the token file's rows with low <= key <= high; the views keep the map alive."""
    batch = pa.ipc.open_file(file).get_batch(SPLITS.index(split))
    keys = to_numpy(batch["key"])
    begin = int(np.searchsorted(keys, np.uint64(low), side="left"))
    end = int(np.searchsorted(keys, np.uint64(high), side="right"))
    docs = np.frombuffer(batch["doc"].buffers()[1] or b"", np.uint8)[: HASH_BYTES * len(batch)]
    return RowRange(
        key=keys[begin:end],
        part=to_numpy(batch["part"])[begin:end],
        offsets=to_numpy(batch["tokens"].offsets)[begin : end + 1],
        tokens=to_numpy(batch["tokens"].values),
        docs=docs.reshape(-1, HASH_BYTES)[begin:end],
        source=to_numpy(batch["source"])[begin:end],
        is_last=to_numpy(batch["is_last"])[begin:end],
        slice=to_numpy(batch["slice"])[begin:end],
        position=to_numpy(batch["position"])[begin:end],
    )


def _in_order(ranges: Sequence[RowRange]) -> list[np.ndarray]:
    """Return all rows by key, ties in the order of the input, in batches of about PASS_TOKENS.

    Each batch is an array of (number of the range, row in it), of shape (rows, 2).
    """
    row = np.concatenate([np.arange(len(rows.key)) for rows in ranges])
    number = np.repeat(np.arange(len(ranges)), [len(rows.key) for rows in ranges])
    order = np.lexsort((row, number, np.concatenate([rows.key for rows in ranges])))
    tokens = np.concatenate([np.diff(rows.offsets) for rows in ranges])[order]
    batch = np.cumsum(tokens) // PASS_TOKENS
    return np.split(np.stack([number[order], row[order]], axis=1), np.flatnonzero(np.diff(batch)) + 1)


class _Provenance:
    """Writes where each row of a shard came from, as a Parquet file with the same number of rows."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._schema = pa.schema(PROVENANCE_COLUMNS)
        self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        self._rows: list[tuple[bytes, int, int, str, int]] = []

    def add(self, doc: bytes, part: int, source: int, file: str, position: int) -> None:
        self._rows.append((doc, part, source, file, position))
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
            docs, parts, sources, files, positions = zip(*self._rows, strict=True)
            codes = {file: code for code, file in enumerate(dict.fromkeys(files))}
            names = string_column([file.encode() for file in codes], pa.string())
            columns = [
                hash_column(docs, HASH_BYTES),
                number_column(parts, pa.uint32()),
                number_column(sources, pa.uint16()),
                pa.DictionaryArray.from_arrays(number_column([codes[file] for file in files], pa.int32()), names),
                number_column(positions, pa.uint64()),
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
            self._rows = []
