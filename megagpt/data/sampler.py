"""Which tokens make global sample g: arithmetic alone, no tables, the same on any number of ranks.

A sample is seq_len inputs of one dataset's token stream and the token after them. Three keyed steps lead from the
global sample number g to it, each computable for any g at once:

    1. dataset   samples come in periods of 65,536, over which a shuffled pattern deals the datasets out in the exact
                 proportion of their weights
    2. epoch     the samples of a dataset follow each other on its line: all inputs of its first epoch, then of its
                 second, and so on; epoch e reads variant e % n_variants of the dataset
    3. window    a permutation of the epoch's windows of seq_len inputs, and a phase that shifts them all, so that no
                 epoch cuts the stream at the same places

A segment is a stretch of samples that are drawn alike. When weights or seq_len change, a new one begins, in which every
dataset goes on along its line where it was. An epoch that is begun keeps its windows to its end, so that each of its
tokens stays an input exactly once: samples of another length are cut from these windows in their order, and one may
be made of several stretches of the stream. If the epoch's end falls within a sample, the sample takes its other inputs
from the first window of the next epoch, and what it leaves of that window comes at the end of that epoch: all other
samples are whole windows again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megagpt.data.permutation import key_of, permute

PERIOD = 1 << 16
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class DatasetPosition:
    """Where the reading of a dataset stands: the first `offset` inputs of `epoch` are read.

    Of an epoch that is begun, also its windows: their length, and how many inputs of the first of them went to a
    sample that began in the epoch before (the others come last).
    """

    epoch: int = 0
    offset: int = 0
    seq_len: int = 0
    split: int = 0


@dataclass(frozen=True)
class Segment:
    """Samples from first_sample on: of each dataset its share of a period, and where it stood before."""

    first_sample: int
    seq_len: int
    shares: tuple[int, ...]
    places: tuple[DatasetPosition, ...]


@dataclass(frozen=True)
class SampleSpans:
    """Rows are stretches of consecutive inputs; sample first + i is rows begin[i] to begin[i + 1], mostly one."""

    begin: I64
    dataset: I64
    epoch: I64
    start: I64
    length: I64


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each dataset in a period: the weights rounded by largest remainder."""
    exact = [w / sum(weights) * PERIOD for w in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: PERIOD - sum(shares)]:
        shares[k] += 1
    return tuple(shares)


@dataclass(frozen=True)
class Sampler:
    """Draws the samples of one segment from datasets whose variant v has n_tokens[k][v] tokens."""

    n_tokens: tuple[tuple[int, ...], ...]
    segment: Segment
    seed: int

    def draw(self, first: int, count: int) -> SampleSpans:
        """Samples first, first + 1, ..., first + count - 1, all within the segment."""
        dataset, turn = self._deal(np.arange(first, first + count, dtype=np.int64))
        parts = []
        for k in np.unique(dataset).tolist():
            [mine] = np.nonzero(dataset == k)
            which, epoch, start, length = self.line(k).cut(turn[mine])
            parts.append((mine[which], np.full_like(which, k), epoch, start, length))
        sample, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        in_order = np.argsort(sample, kind="stable")
        begin = np.searchsorted(sample[in_order], np.arange(count + 1))
        return SampleSpans(begin, *(column[in_order] for column in columns))

    def turns(self, sample: int) -> list[int]:
        """Samples of each dataset before this one, in this segment."""
        period, place = divmod(sample - self.segment.first_sample, PERIOD)
        dealt = np.bincount(self._pattern[0][:place], minlength=len(self.n_tokens)).tolist()
        return [period * share + n for share, n in zip(self.segment.shares, dealt, strict=True)]

    def places(self, sample: int) -> tuple[DatasetPosition, ...]:
        """Where each dataset stands before this sample."""
        return tuple(
            self.line(k).place(turn * self.segment.seq_len) if turn else self.segment.places[k]
            for k, turn in enumerate(self.turns(sample))
        )

    def epochs(self, sample: int) -> list[float]:
        """Passes over each dataset before this sample."""
        return [
            place.epoch + (place.offset / self.line(k).n_inputs(place.epoch, place.seq_len) if place.offset else 0.0)
            for k, place in enumerate(self.places(sample))
        ]

    def line(self, k: int) -> "EpochStream":
        return EpochStream(self.n_tokens[k], self.segment.places[k], self.segment.seq_len, self.seed, k)

    def _deal(self, g: I64) -> tuple[I64, I64]:
        """For each g: the dataset, and how many samples of that dataset came before it in this segment."""
        period, place = np.divmod(g - self.segment.first_sample, PERIOD)
        dataset, before = (column[place] for column in self._pattern)
        return dataset, period * np.asarray(self.segment.shares)[dataset] + before

    @cached_property
    def _pattern(self) -> tuple[I64, I64]:
        """For each place of a period: its dataset, and how many places of that dataset come before it."""
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
    """All inputs of dataset k in the order of one segment: epoch after epoch from `begin` on. t counts them."""

    n_tokens: tuple[int, ...]  # of each variant
    begin: DatasetPosition
    seq_len: int
    seed: int
    k: int

    def n_windows(self, epoch: int, seq_len: int) -> int:
        """Windows per epoch: one fewer than fit, so that every phase has room."""
        return (self.n_tokens[epoch % len(self.n_tokens)] - 1) // seq_len - 1

    def n_inputs(self, epoch: int, seq_len: int) -> int:
        return self.n_windows(epoch, seq_len) * seq_len

    @cached_property
    def rest(self) -> int:
        """Inputs left of the epoch that was begun before this segment."""
        return self.n_inputs(self.begin.epoch, self.begin.seq_len) - self.begin.offset if self.begin.offset else 0

    @cached_property
    def split(self) -> int:
        """Inputs that the sample at the end of an epoch takes from the first window of the next."""
        return -self.rest % self.seq_len

    def place(self, t: int) -> DatasetPosition:
        """Where the dataset stands when t inputs were read; t ends a sample."""
        if t < self.rest:
            return replace(self.begin, offset=self.begin.offset + t)
        [epoch], [offset] = self._epochs(np.array([t - self.rest]))
        return (
            DatasetPosition(int(epoch), int(offset), self.seq_len, self.split)
            if offset
            else DatasetPosition(int(epoch))
        )

    def cut(self, turn: I64) -> tuple[I64, I64, I64, I64]:
        """The stretches of these samples: which of them, epoch, start and length.

        The stretches of one sample come in their order, but not next to each other.
        """
        which, t, left = np.arange(len(turn)), turn * self.seq_len, np.full(len(turn), self.seq_len)
        parts = []
        while len(which):
            epoch, start, room = self._locate(t)
            length = np.minimum(room, left)
            parts.append((which, epoch, start, length))
            more = length < left
            which, t, left = which[more], (t + length)[more], (left - length)[more]
        which, epoch, start, length = (np.concatenate(column) for column in zip(*parts, strict=True))
        return which, epoch, start, length

    def _locate(self, t: I64) -> tuple[I64, I64, I64]:
        """Of the t-th input: its epoch, its place in the stream, and the inputs from there to where the line jumps."""
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
        """Of the t-th input after the epoch that was begun before: its epoch, and its number there."""
        first = self.begin.epoch + (self.begin.offset > 0)
        sizes = np.array([self.n_inputs(first + i, self.seq_len) for i in range(len(self.n_tokens))])
        ends = np.cumsum(sizes)
        rounds, p = np.divmod(t, ends[-1])
        i = np.searchsorted(ends, p, side="right")
        return first + rounds * len(sizes) + i, p - (ends - sizes)[i]

    def _within(self, epoch: int, p: I64, seq_len: int, split: int) -> tuple[I64, I64]:
        """Of the p-th input of an epoch: its place in the stream, and the inputs from there to the window's end."""
        n_windows = self.n_windows(epoch, seq_len)
        turn, at = np.divmod(p - split, seq_len)
        room = seq_len - at
        if split:  # the first window: its first `split` inputs begin the epoch, and its others end it
            turn += 1
            at[turn == 0] -= seq_len - split
            last = turn == n_windows
            turn[last], at[last], room[last] = 0, at[last] + split, room[last] - split
        window = permute(turn, n_windows, key_of(self.seed, 1, self.k, epoch))
        round_, phase = divmod(epoch, seq_len)  # seq_len epochs go through all phases before one comes again
        [shift] = permute(np.array([phase]), seq_len, key_of(self.seed, 2, self.k, round_))
        return shift + window * seq_len + at, room
