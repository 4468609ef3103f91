"""Packing: how the documents of a dataset become samples of seq_len tokens. PACKING has an entry for each method.

Concatenation draws windows of the stream, in which documents follow each other. Best-fit packing (Ding et al. 2024,
arXiv 2404.10830) puts whole documents into rows of seq_len tokens and cuts few. A document is one chunk, or as many
chunks of seq_len tokens as it fills, and the rest. The chunks, longest first, each go to the row with the least space
that still holds it. The space that stays empty is padding: end-of-document ids that are not targets.

A row begins with an end-of-document id, so that each chunk follows one, as in generation. The first token of a chunk
that continues a document is not a target, because in the document it follows other text.

The sampler (sampler.py) knows only streams and windows of them. Rows are drawn by the same arithmetic: `PackedRows` is
a stream in which one position is one row, and a window is one position long (`Packing.window`).
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megagpt.data.loss_mask import Row, Tokens, marked


@dataclass(frozen=True)
class RowPlan:
    """Row i holds the chunks first[i], ..., first[i + 1] - 1; a chunk is `length` tokens of the stream from `start`."""

    seq_len: int
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    continues: NDArray[np.bool_]  # whether a chunk is not its document's first
    n_documents: int
    n_cut: int

    @property
    def n_rows(self) -> int:
        return len(self.first) - 1

    def __str__(self) -> str:
        return (
            f"packed {self.n_documents:,} documents into {self.n_rows:,} rows of {self.seq_len} tokens; "
            f"{self.padding_share:.2%} of them padding, {self.cut_share:.2%} of the documents cut"
        )

    @cached_property
    def padding_share(self) -> float:
        """The fraction of the rows' tokens that is padding."""
        return 1.0 - float(self.length.sum()) / (self.n_rows * self.seq_len)

    @cached_property
    def cut_share(self) -> float:
        """The fraction of the documents that is longer than a row."""
        return self.n_cut / self.n_documents


class PackedRows:
    """The rows of a plan as a stream: `copy(i, out)` writes row i, its tokens marked where they are not targets."""

    def __init__(self, stream: Tokens, plan: RowPlan, eod_id: int) -> None:
        self._stream, self.plan, self._eod_id = stream, plan, eod_id
        # The sampler draws (n_tokens - 1) // seq_len - 1 windows of a stream in an epoch (EpochStream.n_windows). Here
        # its seq_len is 1, so this number makes it draw each of the n_rows rows once.
        self.n_tokens = plan.n_rows + 2

    def copy(self, start: int, out: Row) -> None:
        """Write row `start` into `out`, of seq_len + 1 tokens."""
        plan, at = self.plan, 1
        out[0] = self._eod_id
        for chunk in range(plan.first[start], plan.first[start + 1]):
            end = at + int(plan.length[chunk])
            self._stream.copy(int(plan.start[chunk]), out[at:end])
            if plan.continues[chunk]:
                out[at : at + 1] = marked(out[at : at + 1])
            at = end
        out[at:] = ~self._eod_id

    def chunks(self, row: int) -> list[tuple[int, Row]]:
        """Return (its first token's place in the stream, its tokens) of each chunk of a row."""
        found = []
        for chunk in range(self.plan.first[row], self.plan.first[row + 1]):
            tokens = np.empty(self.plan.length[chunk], dtype=np.int64)
            self._stream.copy(int(self.plan.start[chunk]), tokens)
            found.append((int(self.plan.start[chunk]), tokens))
        return found

    def open_all(self) -> None:
        self._stream.open_all()


@dataclass(frozen=True)
class Packing:
    """A packing method, as the answers to what the sampler, the model and a checkpoint ask of it."""

    masked: bool  # attention stays within each document, and positions restart in it
    plan_rows: Callable[[NDArray[np.int64], int], RowPlan] | None = None
    """Packs documents, given their lengths, into rows of seq_len tokens; None if samples are windows of the stream."""

    def tokens(self, stream: Tokens, lengths: Callable[[], NDArray[np.int64]], seq_len: int, eod_id: int) -> Tokens:
        """Return what the sampler draws from: the stream, or its documents (of these lengths) packed into rows."""
        return PackedRows(stream, self.plan_rows(lengths(), seq_len), eod_id) if self.plan_rows else stream

    def window(self, seq_len: int) -> int:
        """Return the positions of `tokens` that make one sample, which is the sampler's seq_len: one row is one."""
        return 1 if self.plan_rows else seq_len

    @property
    def marks_tokens(self) -> bool:
        """Tell whether samples hold tokens that are not targets (padding), even without augmentation."""
        return self.plan_rows is not None


def plan_best_fit(lengths: NDArray[np.int64], seq_len: int) -> RowPlan:
    """Pack the documents of a stream, given their lengths in order. Deterministic; seconds for millions of them."""
    ends = np.cumsum(lengths)
    n_chunks = -(-lengths // seq_len)
    # Of each chunk of each document, in the order of the stream: its document, and its number within that document.
    document = np.repeat(np.arange(len(lengths)), n_chunks)
    chunk = np.arange(len(document)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
    start = (ends - lengths)[document] + chunk * seq_len
    length = np.minimum(seq_len, ends[document] - start)
    row = best_fit_decreasing(length, seq_len)
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max() + 2))
    return RowPlan(
        seq_len, first, start[order], length[order], chunk[order] > 0, len(lengths), int((n_chunks > 1).sum())
    )


def best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row of each chunk: longest first, each into the row with the least space that holds it, or a new one.

    Chunks of one size are placed together: a row that is the best fit for one of them stays the best until it is full.
    That makes one step for each size and each amount of free space, not one for each chunk.
    """
    row = np.empty(len(sizes), dtype=np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    with_space: dict[int, list[NDArray[np.int64]]] = {}  # free space -> rows
    spaces: list[int] = []  # its keys, sorted
    n_rows = at = 0

    def put(space: int, rows: NDArray[np.int64]) -> None:
        if space == 0 or not len(rows):
            return
        if space not in with_space:
            insort(spaces, space)
        with_space.setdefault(space, []).append(rows)

    counts = np.bincount(sizes, minlength=capacity + 1)
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            # The rows with the least space that holds this size; none is left: open as many as the chunks fill.
            i = bisect_left(spaces, size)
            if i < len(spaces):
                space = spaces.pop(i)
                rows = np.concatenate(with_space.pop(space))
            else:
                space = capacity
                rows = np.arange(n_rows, n_rows - (-left // (space // size)))
                n_rows += len(rows)
            # Each of these rows takes `each` chunks, the last one that is used perhaps fewer.
            each = space // size
            n_used = min(len(rows), -(-left // each))
            n_placed = min(left, n_used * each)
            row[longest_first[at : at + n_placed]] = np.repeat(rows[:n_used], each)[:n_placed]
            # Put the rows back by what space they have now: the full ones, the last one that was used, the unused.
            put(space - each * size, rows[: n_used - 1])
            put(space - (n_placed - (n_used - 1) * each) * size, rows[n_used - 1 : n_used])
            put(space, rows[n_used:])
            at, left = at + n_placed, left - n_placed
    return row


PACKING = {
    "concatenate": Packing(masked=False),
    "concatenate-masked": Packing(masked=True),
    "best-fit": Packing(masked=True, plan_rows=plan_best_fit),
}
"""The methods by their `packing.kind` in the run file (config/schema.py lists the names)."""
