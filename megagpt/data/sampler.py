"""The sampler: which tokens make global sample g, by arithmetic without tables, the same on any number of ranks.

A sample is seq_len inputs of one dataset's token stream and the token after them. Three keyed steps lead from the
global sample number g to it, each computable for any g at once:

    1. dataset   samples come in periods of 65,536, over which a shuffled pattern deals the datasets out in the exact
                 proportion of their weights
    2. epoch     the samples of a dataset follow each other in its epoch stream: all inputs of its first epoch, then of
                 its second, and so on; epoch e reads variant e % n_variants of the dataset
    3. window    a permutation of the epoch's windows of seq_len inputs, and a phase that shifts them all, so that no
                 epoch cuts the stream at the same places

A segment is a range of samples that are drawn by the same weights and seq_len. When these change, a new segment begins,
in which every dataset continues where its reading stopped. An epoch that has begun keeps its windows to its end, so
that each of its tokens stays an input exactly once: samples of another length are cut from these windows in their
order, and one sample may have several spans (runs of consecutive tokens). If the epoch's end falls within a sample, the
sample takes its other inputs from the first window of the next epoch, and the rest of that window comes at the end of
that epoch: all other samples are whole windows again.

With best-fit packing one "token" of a stream is a whole packed row, and seq_len is 1 (packing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megagpt.data.permutation import key_of, permute

PERIOD = 1 << 16  # samples
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class DatasetPosition:
    """The progress in a dataset: the first `offset` inputs of `epoch`.

    For an epoch that has begun also its windows: their length `seq_len`, and how many inputs of the first window went
    to a sample that began in the epoch before (`split`; the window's other inputs come last).
    """

    epoch: int = 0
    offset: int = 0
    seq_len: int = 0
    split: int = 0


@dataclass(frozen=True)
class Segment:
    """The drawing of samples from first_sample on: each dataset's samples in a period, and its position before."""

    first_sample: int
    seq_len: int
    shares: tuple[int, ...]
    places: tuple[DatasetPosition, ...]


@dataclass(frozen=True)
class SampleSpans:
    """The spans of samples, as columns; the i-th sample has the spans begin[i] to begin[i + 1] - 1, mostly one."""

    begin: I64
    dataset: I64
    epoch: I64
    start: I64
    length: I64


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return each dataset's samples in a period: the weights, rounded by the largest remainder method."""
    exact = [w / sum(weights) * PERIOD for w in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: PERIOD - sum(shares)]:
        shares[k] += 1
    return tuple(shares)


@dataclass(frozen=True)
class Sampler:
    """Draws the samples of one segment from datasets; variant v of dataset k has n_tokens[k][v] tokens."""

    n_tokens: tuple[tuple[int, ...], ...]
    segment: Segment
    seed: int

    def draw(self, first: int, count: int) -> SampleSpans:
        """Draw samples first, first + 1, ..., first + count - 1, all within the segment."""
        dataset, turn = self._deal(np.arange(first, first + count, dtype=np.int64))
        columns_by_dataset = []
        for k in np.unique(dataset).tolist():
            [mine] = np.nonzero(dataset == k)
            which, epoch, start, length = self.epoch_stream(k).cut(turn[mine])
            columns_by_dataset.append((mine[which], np.full_like(which, k), epoch, start, length))
        sample, *columns = (np.concatenate(column) for column in zip(*columns_by_dataset, strict=True))
        in_order = np.argsort(sample, kind="stable")
        begin = np.searchsorted(sample[in_order], np.arange(count + 1))
        return SampleSpans(begin, *(column[in_order] for column in columns))

    def turns(self, sample: int) -> list[int]:
        """Return how many samples of each dataset come before this one in the segment."""
        period, place = divmod(sample - self.segment.first_sample, PERIOD)
        dealt = np.bincount(self._pattern[0][:place], minlength=len(self.n_tokens)).tolist()
        return [period * share + n for share, n in zip(self.segment.shares, dealt, strict=True)]

    def places(self, sample: int) -> tuple[DatasetPosition, ...]:
        """Return the position in each dataset before this sample."""
        return tuple(
            self.epoch_stream(k).place(turn * self.segment.seq_len) if turn else self.segment.places[k]
            for k, turn in enumerate(self.turns(sample))
        )

    def epochs(self, sample: int) -> list[float]:
        """Return how many epochs of each dataset come before this sample, as a fraction."""
        return [
            place.epoch
            + (place.offset / self.epoch_stream(k).n_inputs(place.epoch, place.seq_len) if place.offset else 0.0)
            for k, place in enumerate(self.places(sample))
        ]

    def epoch_stream(self, k: int) -> "EpochStream":
        return EpochStream(self.n_tokens[k], self.segment.places[k], self.segment.seq_len, self.seed, k)

    def _deal(self, g: I64) -> tuple[I64, I64]:
        """Return the dataset of each sample, and how many samples of that dataset precede it in the segment."""
        period, place = np.divmod(g - self.segment.first_sample, PERIOD)
        dataset, before = (column[place] for column in self._pattern)
        return dataset, period * np.asarray(self.segment.shares)[dataset] + before

    @cached_property
    def _pattern(self) -> tuple[I64, I64]:
        """Return the dataset of each place of a period, and how many places of that dataset precede it.

        The shuffled places 0 to shares[0] - 1 are the first dataset's, and so on. `before` counts in the order of the
        period because indexing with a mask is in that order.
        """
        dataset = np.searchsorted(np.cumsum(self.segment.shares), _shuffled_period(self.seed), side="right")
        before = np.empty_like(dataset)
        for k, share in enumerate(self.segment.shares):
            before[dataset == k] = np.arange(share)
        return dataset, before


@lru_cache(maxsize=4)
def _shuffled_period(seed: int) -> I64:
    return permute(np.arange(PERIOD), PERIOD, key_of(seed, 0))


@dataclass(frozen=True)
class EpochStream:
    """All inputs of dataset k in the order of one segment, epoch after epoch from `begin` on; t numbers them."""

    n_tokens: tuple[int, ...]  # of each variant
    begin: DatasetPosition
    seq_len: int
    seed: int
    k: int

    def n_windows(self, epoch: int, seq_len: int) -> int:
        """Return the windows of an epoch: one fewer than fit, so that every phase has room."""
        return (self.n_tokens[epoch % len(self.n_tokens)] - 1) // seq_len - 1

    def n_inputs(self, epoch: int, seq_len: int) -> int:
        return self.n_windows(epoch, seq_len) * seq_len

    @cached_property
    def rest(self) -> int:
        """The inputs that are left of an epoch that began before this segment."""
        return self.n_inputs(self.begin.epoch, self.begin.seq_len) - self.begin.offset if self.begin.offset else 0

    @cached_property
    def split(self) -> int:
        """The inputs that the sample at the end of that epoch takes from the first window of the next."""
        return -self.rest % self.seq_len

    def place(self, t: int) -> DatasetPosition:
        """Return the position after t inputs; t ends a sample."""
        if t < self.rest:
            return replace(self.begin, offset=self.begin.offset + t)
        [epoch], [offset] = self._epochs(np.array([t - self.rest]))
        return (
            DatasetPosition(int(epoch), int(offset), self.seq_len, self.split)
            if offset
            else DatasetPosition(int(epoch))
        )

    def cut(self, turn: I64) -> tuple[I64, I64, I64, I64]:
        """Return the spans of these samples as columns: which of them, epoch, start and length.

        The spans of one sample come in their order, but not next to each other.
        """
        which, t, left = np.arange(len(turn)), turn * self.seq_len, np.full(len(turn), self.seq_len)
        rounds = []
        # Each round takes one span of every sample that still lacks inputs; nearly all end in the first.
        while len(which):
            epoch, start, room = self._locate(t)
            length = np.minimum(room, left)
            rounds.append((which, epoch, start, length))
            more = length < left
            which, t, left = which[more], (t + length)[more], (left - length)[more]
        which, epoch, start, length = (np.concatenate(column) for column in zip(*rounds, strict=True))
        return which, epoch, start, length

    def _locate(self, t: I64) -> tuple[I64, I64, I64]:
        """Return the t-th input's epoch, its place in the token stream, and the inputs left in its window."""
        epoch, start, room = np.empty_like(t), np.empty_like(t), np.empty_like(t)
        begun = t < self.rest
        epoch[begun], p = self.begin.epoch, np.empty_like(t)
        p[begun] = self.begin.offset + t[begun]
        epoch[~begun], p[~begun] = self._epochs(t[~begun] - self.rest)
        for e in np.unique(epoch).tolist():
            mine = epoch == e
            old = e == self.begin.epoch and self.rest > 0
            seq_len, split = (self.begin.seq_len, self.begin.split) if old else (self.seq_len, self.split)
            start[mine], room[mine] = self._within(e, p[mine], seq_len, split)
        return epoch, start, room

    def _epochs(self, t: I64) -> tuple[I64, I64]:
        """Return the epoch of the t-th input after the epoch that had begun before, and its number within it."""
        first = self.begin.epoch + (self.begin.offset > 0)
        # Variants differ in length and take turns, so n_variants epochs make a round of always the same length.
        sizes = np.array([self.n_inputs(first + i, self.seq_len) for i in range(len(self.n_tokens))])
        ends = np.cumsum(sizes)
        rounds, p = np.divmod(t, ends[-1])
        i = np.searchsorted(ends, p, side="right")
        return first + rounds * len(sizes) + i, p - (ends - sizes)[i]

    def _within(self, epoch: int, p: I64, seq_len: int, split: int) -> tuple[I64, I64]:
        """Return the place in the token stream of an epoch's p-th input, and the inputs left in its window."""
        n_windows = self.n_windows(epoch, seq_len)
        turn, at = np.divmod(p - split, seq_len)
        room = seq_len - at
        # The first window is cut in two: its first `split` inputs begin the epoch, and its others end it.
        if split:
            turn += 1
            at[turn == 0] -= seq_len - split
            last = turn == n_windows
            turn[last], at[last], room[last] = 0, at[last] + split, room[last] - split
        window = permute(turn, n_windows, key_of(self.seed, 1, self.k, epoch))
        # seq_len epochs go through all phases, in shuffled order, before one comes again.
        round_, phase = divmod(epoch, seq_len)
        [shift] = permute(np.array([phase]), seq_len, key_of(self.seed, 2, self.k, round_))
        return shift + window * seq_len + at, room
