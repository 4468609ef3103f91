"""Open and read datasets in the Arrow format (shard_format.py), as documents or as one flat stream of tokens."""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megagpt.atomic_files import sha256_of
from megagpt.data.manifest import (
    Manifest,
    ShardInfo,
    Split,
    Variant,
    confined,
    read_manifest,
)
from megagpt.data.shard_format import (
    INDEX,
    INDEX_COLUMNS,
    INDEX_SCHEMA,
    ShardHeader,
    damaged,
    map_file,
    numbers,
    read_batch,
)
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer

MAPPED_SHARDS = 2**14  # of a stream, at most: a process may have 65,530 memory maps on most hosts


class Dataset:
    """A finished dataset folder that `open_dataset` has checked. Shards are opened when they are first read."""

    def __init__(self, path: Path, manifest: Manifest, index: pa.RecordBatch):
        self.path = path
        self.manifest = manifest
        self._index = index
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eod_id = manifest.tokenizer.eod_id

    def tokenizer(self) -> Tokenizer:
        info = self.manifest.tokenizer
        return Tokenizer.load(self.path / info.file, sha256=info.sha256)

    def variants(self, split: Split) -> tuple[Variant, ...]:
        """Return the variants of a split. Raises UserError for a split without documents."""
        if split not in self.manifest.splits or self.manifest.splits[split].documents == 0:
            raise UserError(
                f"dataset {self.path} has no documents in its {split!r} split; build it from more documents or with "
                "another val_fraction or test_fraction"
            )
        return self.manifest.splits[split].variants

    def stream(self, split: Split, variant: int = 0) -> "TokenStream":
        self.variants(split)
        return TokenStream(self, split, variant)

    def index(self, split: Split, variant: int = 0) -> dict[str, np.ndarray]:
        """Return index columns with a row for each record batch of a variant, in stream order; none if it is empty."""
        splits = pc.dictionary_encode(self._index["split"])
        is_split = np.array([name == split for name in splits.dictionary.to_pylist()])
        mine = is_split[numbers(splits.indices)] & (numbers(self._index["variant"]) == variant)
        return {name: numbers(self._index[name])[mine] for name in INDEX_COLUMNS if name != "split"}

    def index_rows(self, split: Split, variant: int = 0) -> list[dict[str, int]]:
        """Return `index` as rows."""
        columns = {name: column.tolist() for name, column in self.index(split, variant).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def header(self, split: Split, variant: int, shard: int) -> ShardHeader:
        return ShardHeader(
            build_id=self.manifest.build_id,
            split=split,
            variant=variant,
            shard=shard,
            dtype=self.manifest.dtype,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
            tokenizer_sha256=self.manifest.tokenizer.sha256,
        )

    def shard_path(self, split: Split, variant: int, shard: int) -> Path:
        return self.path / self.manifest.splits[split].variants[variant].shards[shard].path

    def open_shard(self, split: Split, variant: int, shard: int) -> pa.RecordBatchFileReader:
        """Memory-map a shard. Raises UserError if it is damaged or its header is not this shard's of this build."""
        info = self.manifest.splits[split].variants[variant].shards[shard]
        # Again, since open_dataset: reading past the end of a mapped file is a SIGBUS, not an exception.
        _check_size(self.path, info)
        path = self.shard_path(split, variant, shard)
        try:
            reader = pa.ipc.open_file(map_file(path))
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        if not reader.schema.equals(self.header(split, variant, shard).schema, check_metadata=True):
            raise UserError(
                f"shard {path} belongs to another build or another place in this one; restore the original file or "
                "build the dataset again"
            )
        return reader


class TokenStream:
    """A variant of a split as one stream of tokens, read from memory maps without a copy in between."""

    def __init__(self, dataset: Dataset, split: Split, variant: int = 0):
        index = dataset.index(split, variant)
        self.dataset = dataset
        self.split: Split = split
        self._variant = variant
        self._index = index
        self._tok0: list[int] = index["tok0"].tolist()  # a plain list: bisect beats numpy for one number
        self._row0: list[int] = index["row0"].tolist()
        self._views: list[np.ndarray | None] = [None] * len(self._tok0)  # opened on first use, then kept
        self._readers: dict[int, pa.RecordBatchFileReader] = {}
        self._lock = threading.Lock()  # opening only: a prefetch thread and the main thread share a stream
        self.n_tokens = self._tok0[-1] + int(self._index["n_tokens"][-1])
        self.n_rows = self._row0[-1] + int(self._index["n_rows"][-1])

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (one dimension, any integer type) with the tokens from `start` on. Raises IndexError."""
        n = len(out)
        if start < 0 or start + n > self.n_tokens:
            raise IndexError(f"tokens {start}..{start + n} are not within 0..{self.n_tokens}")
        batch = bisect_right(self._tok0, start) - 1
        view = self._views[batch]
        begin = start - self._tok0[batch]
        # Nearly always the tokens lie in one record batch that is open already.
        if view is not None and begin + n <= len(view):
            out[:] = view[begin : begin + n]
            return
        filled = 0
        while filled < len(out):
            view = self._views[batch]
            if view is None:
                view = self._open(batch)
            begin = start + filled - self._tok0[batch]
            tokens = view[begin : begin + len(out) - filled]
            out[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            batch += 1

    def open_all(self) -> None:
        """Open every shard now, which checks that it belongs to this build, and not when its first token is read."""
        for shard in np.unique(self._index["shard"]).tolist():
            self._reader(shard)

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document in order, its end-of-document token included."""
        rows: list[np.ndarray] = []
        for i in range(self.n_rows):
            rows.append(self.row(i))
            # Only the last row of a long document ends in an end-of-document id.
            if rows[-1][-1] == self.dataset.eod_id:
                yield rows[0] if len(rows) == 1 else np.concatenate(rows)
                rows = []

    def document_lengths(self) -> np.ndarray:
        """Return the length of every document in order, int64, end-of-document tokens included. Reads no token."""
        begins: list[np.ndarray] = []  # of the rows that begin a document
        for i, tok0 in enumerate(self._tok0):
            batch = self._record_batch(i)
            offsets = numbers(batch.column("tokens").offsets)
            begins.append(tok0 + offsets[:-1][numbers(batch.column("part")) == 0])
        return np.diff(np.concatenate(begins), append=self.n_tokens)

    def row_ends(self) -> np.ndarray:
        """Return where each row ends, int64, counted in tokens of the stream. Reads no token."""
        batches = [numbers(self._record_batch(i).column("tokens").offsets)[1:] for i in range(len(self._tok0))]
        return np.concatenate([tok0 + ends for tok0, ends in zip(self._tok0, batches, strict=True)])

    def row_sources(self) -> np.ndarray:
        """Return the source of each row, int64, as a place in the manifest's `sources`. Reads no token."""
        batches = [numbers(self._record_batch(i).column("source")) for i in range(len(self._tok0))]
        return np.concatenate(batches).astype(np.int64)

    def rows_of(self, start: int, length: int) -> range:
        """Return the rows that hold the `length` tokens from `start` on."""
        return range(self._row_at(start), self._row_at(start + length - 1) + 1)

    def _row_at(self, token: int) -> int:
        batch = bisect_right(self._tok0, token) - 1
        offsets = self._record_batch(batch).column("tokens").offsets.to_numpy()
        return self._row0[batch] + int(np.searchsorted(offsets, token - self._tok0[batch], side="right")) - 1

    def row(self, i: int) -> np.ndarray:
        """Return a read-only view of row i: a document, or a part of a long one. Raises IndexError."""
        if not 0 <= i < self.n_rows:
            raise IndexError(f"row {i} is not within 0..{self.n_rows}")
        batch = bisect_right(self._row0, i) - 1
        tokens = self._record_batch(batch).column("tokens")
        row = i - self._row0[batch]
        begin, end = tokens.offsets[row : row + 2].to_pylist()
        ids = _values(tokens)
        if not 0 <= begin < end <= len(ids):
            shard = int(self._index["shard"][batch])
            raise damaged(self.dataset.shard_path(self.split, self._variant, shard), f"row {i} has no tokens")
        return ids[begin:end]

    def _open(self, batch: int) -> np.ndarray:
        self._views[batch] = view = _values(self._record_batch(batch).column("tokens"))
        return view

    def _reader(self, shard: int) -> pa.RecordBatchFileReader:
        with self._lock:
            if shard not in self._readers:
                if len(self._readers) >= MAPPED_SHARDS:
                    self._release(next(iter(self._readers)))
                self._readers[shard] = self.dataset.open_shard(self.split, self._variant, shard)
            return self._readers[shard]

    def _release(self, shard: int) -> None:
        """Forget a shard's views and reader; its memory map is gone with the last array that somebody still reads."""
        for batch in np.flatnonzero(self._index["shard"] == shard).tolist():
            self._views[batch] = None
        del self._readers[shard]

    def _record_batch(self, batch: int) -> pa.RecordBatch:
        names = ("shard", "batch", "n_rows", "n_tokens")
        shard, number, n_rows, n_tokens = (int(self._index[name][batch]) for name in names)
        path = self.dataset.shard_path(self.split, self._variant, shard)
        reader = self._reader(shard)
        with self._lock:
            record_batch = read_batch(reader, number, path)
        if (len(record_batch), len(_values(record_batch["tokens"]))) != (n_rows, n_tokens):
            raise damaged(path, f"record batch {number} is not as long as index.arrow says")
        return record_batch


def open_dataset(path: Path) -> Dataset:
    """Open a dataset and check all of it but the tokens (`python -m data_tools verify` does that). Raises UserError."""
    manifest = read_manifest(path)
    model = confined(path, manifest.tokenizer.file)
    if not model.is_file() or sha256_of(model) != manifest.tokenizer.sha256:
        raise UserError(f"{model} is not the tokenizer this dataset was made with; restore the original file")
    for split in manifest.splits.values():
        for variant in split.variants:
            for shard in variant.shards:
                _check_size(path, shard)
    index = path / INDEX
    if not index.is_file() or sha256_of(index) != manifest.index_sha256:
        raise UserError(f"index {index} is missing or damaged; restore it or build the dataset again")
    try:
        table = pa.ipc.open_file(index.read_bytes()).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, SystemError, UnicodeDecodeError) as error:
        raise damaged(index, error) from error
    if not table.schema.equals(INDEX_SCHEMA) or not len(table):
        raise UserError(f"{index} is not an index of this format; build the dataset again")
    return Dataset(path, manifest, table.combine_chunks().to_batches()[0])


def _values(tokens: pa.LargeListArray) -> np.ndarray:
    return numbers(tokens.values)


def _check_size(folder: Path, info: ShardInfo) -> None:
    path = confined(folder, info.path)
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is None or not S_ISREG(status.st_mode):
        raise UserError(f"shard {path} is missing; restore it or build the dataset again")
    if status.st_size != info.bytes:
        raise UserError(
            f"shard {path} has {status.st_size:,} bytes instead of {info.bytes:,} (an interrupted copy?); "
            "restore it or build the dataset again"
        )
