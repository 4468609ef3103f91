"""Count the bytes of UTF-8 text that tokens stand for: what bits per byte divides by.

The pieces of a tokenizer that keeps every text have the same bytes as the text. Those of one that loses text have not:
an unknown token stands for any text, and a normalizer changes lengths. For such a tokenizer, a build stores the bytes
of each row of a shard in the provenance file, in the column BYTES.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.data.dataset import TokenStream
from megagpt.data.manifest import confined
from megagpt.data.provenance import BYTES, provenance_path
from megagpt.data.shard_format import damaged, numbers


class TextBytes(NamedTuple):
    bytes: int
    by_row: bool  # False in a dataset of an older megagpt, without the rows' bytes: the split's mean is taken


def text_bytes(stream: TokenStream, first: int, last: int) -> TextBytes:
    """Return the bytes of text of the tokens from `first` up to `last`, exclusive: those of the documents themselves.

    Where a row is cut, its bytes count in proportion to its tokens.
    """
    n_bytes = _row_bytes(stream)
    if n_bytes is None:
        split = stream.dataset.manifest.splits[stream.split]
        return TextBytes(round(split.bytes * (last - first) / split.tokens), by_row=False)
    ends, totals = np.append(0, stream.row_ends()), np.append(0, np.cumsum(n_bytes))
    begin, end = np.interp([first, last], ends, totals)
    return TextBytes(round(end - begin), by_row=True)


def text_bytes_by_source(stream: TokenStream, first: int, last: int) -> np.ndarray:
    """Return the bytes of text of each source's tokens from `first` up to `last`, exclusive, as text_bytes counts."""
    sources, ends, n_bytes = stream.row_sources(), stream.row_ends(), _row_bytes(stream)
    lengths = np.diff(ends, prepend=0)
    inside = np.clip(np.minimum(ends, last) - np.maximum(ends - lengths, first), 0, None)
    if n_bytes is None:
        split = stream.dataset.manifest.splits[stream.split]
        n_bytes = split.bytes * lengths / split.tokens
    return np.bincount(sources, weights=n_bytes * inside / lengths, minlength=len(stream.dataset.manifest.sources))


def _row_bytes(stream: TokenStream) -> np.ndarray | None:
    """Return the bytes of each row of the canonical tokenization, in order; None where they are not stored."""
    dataset = stream.dataset
    columns = []
    for shard in dataset.manifest.splits[stream.split].variants[0].shards:
        file = confined(dataset.path, provenance_path(shard.path))
        try:
            if BYTES not in pq.read_schema(file).names:
                return None
            columns += [numbers(chunk) for chunk in pq.read_table(file, columns=[BYTES])[BYTES].chunks if len(chunk)]
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise damaged(file, error) from error
    n_bytes = np.concatenate(columns)
    if len(n_bytes) != stream.n_rows:
        raise damaged(file.parent, f"its files have {len(n_bytes):,} rows, the shards have {stream.n_rows:,}")
    return n_bytes
