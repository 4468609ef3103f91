"""Parts to shards: each shard takes a range of the rows' keys from every part and writes them in order of key.

Keys are uniform, so shards come out alike in size, and the documents of a split are shuffled as a whole. A task goes
through its range in passes, which bound the rows it has to sort, and through a pass in runs of about PASS_TOKENS, which
bound what it maps: a long text's rows have one key, so a pass may hold any number of tokens.
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
ROW_GROUP = 2**16  # of the provenance
WHERE = {
    "doc": pa.binary(HASH_BYTES),
    "part": pa.uint32(),
    "source": pa.uint16(),
    "file": pa.dictionary(pa.int32(), pa.string()),
    "position": pa.uint64(),
}


class RowRange(NamedTuple):
    """A stretch of one part's rows, as views of its memory map."""

    key: np.ndarray
    part: np.ndarray  # of a long document
    offsets: np.ndarray  # into tokens, one more than rows
    tokens: np.ndarray
    docs: np.ndarray  # (rows, 16) bytes
    source: np.ndarray
    is_last: np.ndarray
    slice: np.ndarray
    position: np.ndarray


def write_shard(prefix: Path, header: ShardHeader, n_shards: int, n_passes: int, listed: Path) -> dict[str, Any]:
    """Shard `header.shard` of the n_shards of its split: what the manifest and the index say about it.

    `listed` is the list of (a part's path below the scratch folder, the files its slices are of). Beside the shard,
    row for row, goes where each of its documents came from.
    """
    parts = read_list(listed)
    writer = ShardWriter(file_of(prefix, SHARD), header)
    provenance = _Provenance(file_of(prefix, PROVENANCE))
    for step in range(header.shard * n_passes, (header.shard + 1) * n_passes):
        keys = range(2**64 * step // (n_shards * n_passes), 2**64 * (step + 1) // (n_shards * n_passes))
        opened = partial(_opened, prefix.parents[1], [part for part, _ in parts], keys, header.split)
        with opened() as stretches:
            order = _in_order(stretches)
        for run in order:
            with opened() as stretches:  # anew, to give back the memory of what the last run has read
                for stretch, i in run.tolist():
                    columns, files = stretches[stretch], parts[stretch][1]
                    doc, part, source = columns.docs[i].tobytes(), int(columns.part[i]), int(columns.source[i])
                    tokens = columns.tokens[columns.offsets[i] : columns.offsets[i + 1]]
                    writer.add(ShardRow(tokens, doc, source, part, bool(columns.is_last[i])))
                    provenance.add(doc, part, source, files[columns.slice[i]], int(columns.position[i]))
                writer.flush()  # what it holds are views of these maps
    info, index = writer.close()
    return {"info": info.model_dump(), "index": index, "provenance_sha256": provenance.close()}


@contextmanager
def _opened(folder: Path, parts: Sequence[str], keys: range, split: Split) -> Iterator[list[RowRange]]:
    """Each part's rows whose keys are in the range; nothing is read before it is looked at."""
    with ExitStack() as opened:
        maps = [opened.enter_context(pa.memory_map(str(folder / part))) for part in parts]
        yield [_rows_between(keys[0], keys[-1], file, split) for file in maps]


def _rows_between(low: int, high: int, file: pa.MemoryMappedFile, split: Split) -> RowRange:
    """The part's rows with low <= key <= high; the views keep the map alive."""
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


def _in_order(stretches: Sequence[RowRange]) -> list[np.ndarray]:
    """Runs of (stretch, row), (rows, 2) each, of about PASS_TOKENS: every row by key, then as the input has them."""
    row = np.concatenate([np.arange(len(columns.key)) for columns in stretches])
    stretch = np.repeat(np.arange(len(stretches)), [len(columns.key) for columns in stretches])
    order = np.lexsort((row, stretch, np.concatenate([columns.key for columns in stretches])))
    tokens = np.concatenate([np.diff(columns.offsets) for columns in stretches])[order]
    run = np.cumsum(tokens) // PASS_TOKENS
    return np.split(np.stack([stretch[order], row[order]], axis=1), np.flatnonzero(np.diff(run)) + 1)


class _Provenance:
    """A Parquet file as long as its shard."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._schema = pa.schema(WHERE)
        self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        self._rows: list[tuple[bytes, int, int, str, int]] = []

    def add(self, doc: bytes, part: int, source: int, file: str, position: int) -> None:
        self._rows.append((doc, part, source, file, position))
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> str:
        """Its sha256."""
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
