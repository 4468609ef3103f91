"""Best-fit packing (Ding et al. 2024, arXiv 2404.10830): whole documents share a row, and few are cut.

A document longer than seq_len is cut into chunks of seq_len tokens. The pieces, longest first, each go to the row with
the least space that still holds it. What stays empty is padding: end-of-document ids that are no targets.

A row begins with an end-of-document id, so that each piece stands behind one, as in generation. For a chunk that goes
on with a document that is not true, so its first token is no target.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megagpt.data.loss_mask import Row, Tokens, marked


@dataclass(frozen=True)
class RowPlan:
    """Row i holds the pieces first[i], ..., first[i + 1] - 1; a piece is `length` tokens of the stream from `start`."""

    seq_len: int
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    goes_on: NDArray[np.bool_]  # a chunk that is not its document's first
    n_documents: int
    n_cut: int

    @property
    def n_rows(self) -> int:
        return len(self.first) - 1

    def __str__(self) -> str:
        return (
            f"best fit packs {self.n_documents:,} documents into {self.n_rows:,} rows of {self.seq_len} tokens; "
            f"{self.padding_share:.2%} of them padding, {self.cut_share:.2%} of the documents cut"
        )

    @cached_property
    def padding_share(self) -> float:
        """Of all targets."""
        return 1.0 - float(self.length.sum()) / (self.n_rows * self.seq_len)

    @cached_property
    def cut_share(self) -> float:
        """Of all documents: those longer than a row."""
        return self.n_cut / self.n_documents


class PackedRows:
    """The rows of a plan in the place of a stream: `copy(i, out)` writes row i, marked where nothing is to be learned.

    To a Sampler with seq_len=1 it is a stream whose windows are the rows, each drawn once in an epoch.
    """

    def __init__(self, stream: Tokens, plan: RowPlan, eod_id: int) -> None:
        self._stream, self.plan, self._eod_id = stream, plan, eod_id
        self.n_tokens = plan.n_rows + 2  # of which such a Sampler makes n_rows windows

    def copy(self, start: int, out: Row) -> None:
        plan, at = self.plan, 1
        out[0] = self._eod_id
        for piece in range(plan.first[start], plan.first[start + 1]):
            end = at + int(plan.length[piece])
            self._stream.copy(int(plan.start[piece]), out[at:end])
            if plan.goes_on[piece]:
                out[at : at + 1] = marked(out[at : at + 1])
            at = end
        out[at:] = ~self._eod_id

    def pieces(self, row: int) -> list[tuple[int, Row]]:
        """Of a row: where in the stream each piece begins, and its tokens."""
        found = []
        for piece in range(self.plan.first[row], self.plan.first[row + 1]):
            tokens = np.empty(self.plan.length[piece], dtype=np.int64)
            self._stream.copy(int(self.plan.start[piece]), tokens)
            found.append((int(self.plan.start[piece]), tokens))
        return found

    def open_all(self) -> None:
        self._stream.open_all()


def plan_rows(lengths: NDArray[np.int64], seq_len: int) -> RowPlan:
    """Pack the documents of a stream, given their lengths in order. Deterministic; seconds for millions."""
    ends = np.cumsum(lengths)
    n_chunks = -(-lengths // seq_len)
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
    """The row of each piece: longest first, each into the row with the least space that holds it, else a new one.

    Pieces of one size are placed together: a row that is the best fit for one of them stays so until it is full.
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
            i = bisect_left(spaces, size)
            if i < len(spaces):
                space = spaces.pop(i)
                rows = np.concatenate(with_space.pop(space))
            else:
                space = capacity
                rows = np.arange(n_rows, n_rows - (-left // (space // size)))
                n_rows += len(rows)
            each = space // size
            n_used = min(len(rows), -(-left // each))
            n_placed = min(left, n_used * each)
            row[longest_first[at : at + n_placed]] = np.repeat(rows[:n_used], each)[:n_placed]
            put(space - each * size, rows[: n_used - 1])
            put(space - (n_placed - (n_used - 1) * each) * size, rows[n_used - 1 : n_used])
            put(space, rows[n_used:])
            at, left = at + n_placed, left - n_placed
    return row
