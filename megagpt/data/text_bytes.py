"""Count the bytes of UTF-8 text that tokens stand for: what bits per byte divides by.

The pieces of a tokenizer that keeps every text have the same bytes as the text. Those of one that loses text have not:
an unknown token stands for any text, and a normalizer changes lengths. For such a tokenizer, a build stores the bytes
of each row of a shard in the provenance file, in the column BYTES.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.data.dataset import TokenStream
from megagpt.data.manifest import confined
from megagpt.data.provenance import BYTES, provenance_path
from megagpt.data.shard_format import numbers


def text_bytes(stream: TokenStream, first: int, last: int) -> int:
    """Return the bytes of text of the tokens from `first` up to `last`, exclusive: those of the documents themselves.

    Where a row is cut, its bytes count in proportion to its tokens. Datasets of an older megagpt have no rows' bytes:
    their tokens count as the split's mean.
    """
    n_bytes = _row_bytes(stream)
    if n_bytes is None:
        split = stream.dataset.manifest.splits[stream.split]
        return round(split.bytes * (last - first) / split.tokens)
    ends, totals = np.append(0, stream.row_ends()), np.append(0, np.cumsum(n_bytes))
    begin, end = np.interp([first, last], ends, totals)
    return round(end - begin)


def _row_bytes(stream: TokenStream) -> np.ndarray | None:
    """Return the bytes of each row of the canonical tokenization, in order; None where they are not stored."""
    dataset = stream.dataset
    columns = []
    for shard in dataset.manifest.splits[stream.split].variants[0].shards:
        file = confined(dataset.path, provenance_path(shard.path))
        try:
            columns += [numbers(chunk) for chunk in pq.read_table(file, columns=[BYTES])[BYTES].chunks if len(chunk)]
        except (OSError, pa.ArrowException, KeyError):
            return None
    n_bytes = np.concatenate(columns)
    return n_bytes if len(n_bytes) == stream.n_rows else None
