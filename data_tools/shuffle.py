"""Parts to shards: each shard takes a range of the rows' keys from every part and writes them in order of key.

Keys are uniform, so shards come out alike in size, and the documents of a split are shuffled as a whole. A task
holds one shard in memory, whatever the size of the dataset.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_tools.shard_writer import Row, ShardWriter
from megagpt.data_manifest import SPLITS, ShardInfo, Split
from megagpt.shards import HASH_BYTES, ShardHeader


class Rows(NamedTuple):
    keys: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    docs: np.ndarray  # (rows, 16) bytes
    tokens: np.ndarray  # of all rows, one after the other


def write_shard(
    header: ShardHeader, n_shards: int, parts: Sequence[Path], folder: Path
) -> tuple[ShardInfo, list[dict[str, Any]]]:
    """Shard `header.shard` of the split's n_shards: what the manifest and the index say about it."""
    low = 2**64 * header.shard // n_shards
    high = 2**64 * (header.shard + 1) // n_shards - 1
    read = [_rows_between(low, high, part, header.split) for part in parts]
    rows = Rows(*(np.concatenate(columns) for columns in zip(*read, strict=True)))
    ends = np.cumsum(rows.lengths)
    path = folder / header.path
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path, header)
    for i in np.argsort(rows.keys, kind="stable"):
        tokens = rows.tokens[ends[i] - rows.lengths[i] : ends[i]]
        writer.add(Row(tokens, rows.docs[i].tobytes(), int(rows.sources[i])))
    return writer.close()


def _rows_between(low: int, high: int, part: Path, split: Split) -> Rows:
    """The part's rows with low <= key <= high, copied, so that no file stays open."""
    with pa.memory_map(str(part)) as file:
        batch = pa.ipc.open_file(file).get_batch(SPLITS.index(split))
        keys = batch["key"].to_numpy()
        begin = int(np.searchsorted(keys, np.uint64(low), side="left"))
        end = int(np.searchsorted(keys, np.uint64(high), side="right"))
        offsets = batch["tokens"].offsets.to_numpy()[begin : end + 1]
        docs = batch["doc"].buffers()[1][HASH_BYTES * begin : HASH_BYTES * end]
        return Rows(
            keys=keys[begin:end].copy(),
            lengths=np.diff(offsets),
            sources=batch["source"].to_numpy()[begin:end].copy(),
            docs=np.frombuffer(docs, np.uint8).reshape(-1, HASH_BYTES).copy(),
            tokens=batch["tokens"].values.to_numpy()[offsets[0] : offsets[-1]].copy(),
        )
