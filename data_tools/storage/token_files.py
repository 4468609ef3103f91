"""Token files: temporary Arrow files of token rows sorted by key, which tokenizing leaves for the shuffle.

The file of a unit has one record batch per split. A merged file has the rows of many files in one split, in as many
record batches as they take. Files are mapped and closed (map_file), so none counts towards the limit of open files.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_tools.storage.arrow_columns import number_column, to_numpy
from data_tools.storage.shard_writer import ShardRow, document_columns
from megagpt.data.manifest import SPLITS, Split
from megagpt.data.provenance import BYTES
from megagpt.data.shard_format import HASH_BYTES, document_schema, map_file, token_dtype

PASS_TOKENS = 2**26
# the columns of a token file besides those of a shard
EXTRA = {"key": pa.uint64(), "slice": pa.uint32(), "position": pa.uint64(), "is_last": pa.bool_()}
BYTES_TYPE = pa.uint64()  # of the column BYTES, which files have whose tokenizer loses text


class KeyedRow(NamedTuple):
    """A shard's row, with the key that it is sorted by and its place in the input."""

    key: int
    row: ShardRow
    slice: int
    position: int
    bytes: int = 0  # of the text


class TokenFile(NamedTuple):
    path: str  # below the scratch folder
    inputs: Sequence[str]  # the input file of each slice that the rows name
    last_keys: Sequence[int] | None = None  # of a merged file's record batches; None for the file of a unit

    def as_json(self) -> tuple[Any, ...]:
        return self if self.last_keys is not None else self[:2]


class RowRange(NamedTuple):
    """The rows of one record batch in a range of keys, as views of its memory map; one array per column."""

    file: int  # number of the token file
    key: np.ndarray
    part: np.ndarray  # number of the row in its document
    offsets: np.ndarray  # (rows + 1,), into tokens
    tokens: np.ndarray
    docs: np.ndarray  # (rows, 16) bytes
    source: np.ndarray
    is_last: np.ndarray
    slice: np.ndarray
    position: np.ndarray
    bytes: np.ndarray | None  # of the text, where they are stored

    def row(self, i: int) -> KeyedRow:
        tokens = self.tokens[self.offsets[i] : self.offsets[i + 1]]
        doc, source, part = self.docs[i].tobytes(), int(self.source[i]), int(self.part[i])
        shard_row = ShardRow(tokens, doc, source, part, bool(self.is_last[i]))
        n_bytes = 0 if self.bytes is None else int(self.bytes[i])
        return KeyedRow(int(self.key[i]), shard_row, int(self.slice[i]), int(self.position[i]), n_bytes)


def token_file_schema(vocab_size: int, *, with_bytes: bool) -> pa.Schema:
    schema = document_schema(token_dtype(vocab_size))
    for name, type_ in _extra(with_bytes).items():
        schema = schema.append(pa.field(name, type_))
    return schema


def _extra(with_bytes: bool) -> dict[str, pa.DataType]:
    return EXTRA | {BYTES: BYTES_TYPE} if with_bytes else EXTRA


def have_bytes(folder: Path, files: Sequence[TokenFile]) -> bool:
    """Tell whether all files store the bytes of text, as those of a build that an older megagpt began may not."""
    return all(BYTES in pa.ipc.open_file(map_file(folder / file.path)).schema.names for file in files)


def token_batch(rows: Sequence[KeyedRow], vocab_size: int, *, with_bytes: bool) -> pa.RecordBatch:
    """Return rows, sorted by key, as a record batch of a token file."""
    extra: list[list[int]] = [
        [row.key for row in rows],
        [row.slice for row in rows],
        [row.position for row in rows],
        [row.row.is_last for row in rows],
        [row.bytes for row in rows],
    ]
    types = _extra(with_bytes).values()
    arrays = [number_column(values, type_) for values, type_ in zip(extra, types, strict=False)]
    columns = [*document_columns([row.row for row in rows], vocab_size), *arrays]
    return pa.record_batch(columns, schema=token_file_schema(vocab_size, with_bytes=with_bytes))


def count_tokens(folder: Path, files: Sequence[TokenFile], split: Split) -> int:
    return sum(len(rows.tokens) for rows in _rows_between(folder, files, range(2**64), split))


def sorted_rows(
    folder: Path, files: Sequence[TokenFile], keys: range, split: Split
) -> Iterator[Iterator[tuple[int, KeyedRow]]]:
    """Yield (number of the file, row) of all rows with a key in the range, by key, ties in the order of the input.

    They come in batches of about PASS_TOKENS, whose tokens are views of memory maps. Each batch has maps of its own, to
    release the pages that the batch before has read, so its rows must be written before the next one is taken.
    """
    for batch in _in_order(_rows_between(folder, files, keys, split)):
        ranges = _rows_between(folder, files, keys, split)
        yield ((ranges[number].file, ranges[number].row(i)) for number, i in batch.tolist())
        ranges = []


def _rows_between(folder: Path, files: Sequence[TokenFile], keys: range, split: Split) -> list[RowRange]:
    """Map each token file and find its rows in the range of keys; tokens are read only when they are accessed."""
    low, high = keys[0], keys[-1]
    ranges = []
    for number, file in enumerate(files):
        reader = pa.ipc.open_file(map_file(folder / file.path))
        batches = [SPLITS.index(split)]
        if file.last_keys is not None:
            end = min(bisect_right(file.last_keys, high) + 1, len(file.last_keys))
            batches = list(range(bisect_left(file.last_keys, low), end))
        ranges += [_rows_of(number, reader.get_batch(i), low, high) for i in batches]
    return ranges


def _rows_of(number: int, batch: pa.RecordBatch, low: int, high: int) -> RowRange:
    """Return the rows with low <= key <= high; the views keep the map alive."""
    keys = to_numpy(batch["key"])
    begin = int(np.searchsorted(keys, np.uint64(low), side="left"))
    end = int(np.searchsorted(keys, np.uint64(high), side="right"))
    docs = np.frombuffer(batch["doc"].buffers()[1] or b"", np.uint8)[: HASH_BYTES * len(batch)]
    return RowRange(
        file=number,
        key=keys[begin:end],
        part=to_numpy(batch["part"])[begin:end],
        offsets=to_numpy(batch["tokens"].offsets)[begin : end + 1],
        tokens=to_numpy(batch["tokens"].values),
        docs=docs.reshape(-1, HASH_BYTES)[begin:end],
        source=to_numpy(batch["source"])[begin:end],
        is_last=to_numpy(batch["is_last"])[begin:end],
        slice=to_numpy(batch["slice"])[begin:end],
        position=to_numpy(batch["position"])[begin:end],
        bytes=to_numpy(batch[BYTES])[begin:end] if BYTES in batch.schema.names else None,
    )


def _in_order(ranges: Sequence[RowRange]) -> list[np.ndarray]:
    """Return all rows by key, ties in the order of the input, in batches of about PASS_TOKENS.

    Each batch is an array of (number of the range, row in it), of shape (rows, 2).
    """
    if not ranges:
        return []
    row = np.concatenate([np.arange(len(rows.key)) for rows in ranges])
    number = np.repeat(np.arange(len(ranges)), [len(rows.key) for rows in ranges])
    order = np.lexsort((row, number, np.concatenate([rows.key for rows in ranges])))
    tokens = np.concatenate([np.diff(rows.offsets) for rows in ranges])[order]
    batch = np.cumsum(tokens) // PASS_TOKENS
    return np.split(np.stack([number[order], row[order]], axis=1), np.flatnonzero(np.diff(batch)) + 1)
