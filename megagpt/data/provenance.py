"""Provenance: where the documents of a dataset came from, read from the Parquet files next to its shards."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.data.dataset import Dataset
from megagpt.data.manifest import Split
from megagpt.data.training_set import TrainingSet
from megagpt.errors import UserError, limit_reached
from megagpt.terminal import builder_command, typed

FOLDER = "provenance"
BYTES = "bytes"  # an optional column: UTF-8 bytes of each row's text, where those of its tokens' pieces are others


@dataclass(frozen=True)
class Origin:
    """The origin of one row: a document, or a part of a long one."""

    doc: str  # content hash
    part: int
    source: str
    file: str
    position: int

    def __str__(self) -> str:
        part = f", part {self.part}" if self.part else ""
        return f"{self.source}: {self.file} at {self.position:,}{part} (document {self.doc[:16]})"


def provenance_path(shard_path: str) -> str:
    """Return where the provenance of a shard lies; both paths are relative to the dataset's folder."""
    return f"{FOLDER}/{shard_path.removesuffix('.arrow')}.parquet"


def origins(dataset: Dataset, split: Split, rows: Iterable[int]) -> Iterator[Origin]:
    """Yield the origin of each of the split's rows. Raises UserError if the files are missing or damaged.

    Every variant of a split has the same rows in the same order, so the canonical one's files serve all.
    """
    index = dataset.index(split)
    present = np.unique(index["shard"]).tolist()  # a shard without rows is not in the index
    firsts = [int(index["row0"][index["shard"] == shard].min()) for shard in present]
    shards = dataset.manifest.splits[split].variants[0].shards
    sources = [source.name for source in dataset.manifest.sources]
    for row in rows:
        at = bisect_right(firsts, row) - 1
        path = dataset.path / provenance_path(shards[present[at]].path)
        try:
            record = _read_row(path, row - firsts[at])
        except (OSError, pa.ArrowException, IndexError) as error:
            if limit := limit_reached(error):
                raise limit from error
            raise UserError(f"provenance {path} cannot be read ({error}); restore it or rebuild the dataset") from error
        yield Origin(record["doc"].hex(), record["part"], sources[record["source"]], record["file"], record["position"])


def _read_row(path: Path, row: int) -> dict[str, Any]:
    table = _read_table(path, path.stat().st_mtime_ns)  # the time makes the cache miss when the file changes
    if row >= len(table):
        raise IndexError(f"it has no row {row}")
    return table.slice(row, 1).to_pylist()[0]


@lru_cache(maxsize=4)
def _read_table(path: Path, changed: int) -> pa.Table:
    return pq.read_table(path)


def documents_of(data: TrainingSet, samples: Iterable[int], run: Path, step: int, limit: int = 5) -> str:
    """Describe where the first `limit` documents of these samples, which `step` of the run took, came from."""

    def named() -> Iterable[str]:
        for sample in samples:
            for span in data.spans(sample):
                rows = span.dataset.stream("train", span.variant).rows_of(span.start, len(span.tokens))
                for origin in origins(span.dataset, "train", rows):
                    yield f"{span.dataset.path}, {origin}"

    try:
        found = list(islice(named(), limit))
    except UserError as error:
        found = [str(error)]
    return "; ".join(found) + f"; `{builder_command()} inspect {typed(run)} --step {step}` shows all"
