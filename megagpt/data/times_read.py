"""Count how often a run has read passages of its training data, by its sampler alone: exact, and without reading data.

A passage is read where one sample holds all of it. Epochs cut the stream at different places, so that an epoch may
read a passage in two halves, which do not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagpt.data.mixture import Mixture
from megagpt.data.sampler import SampleSpans

AT_ONCE = 1 << 16  # samples
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Passages:
    """Passages as columns: the dataset (by its number in the mixture), the variant, and the first token of each.

    All are `length` tokens long. With packed rows a token stands for a row, as in the sampler, and a passage for the
    row that it lies in.
    """

    dataset: I64
    variant: I64
    begin: I64
    length: int


def trained_samples(mixture: Mixture, step: int) -> list[range]:
    """Return the samples that the steps up to `step` took; those that a roll-back left out are not among them."""
    found = []
    ends = [*(change.first_step for change in mixture.batches[1:]), step]
    for change, end in zip(mixture.batches, ends, strict=True):
        n_steps = min(end, step) - change.first_step
        if n_steps > 0:
            found.append(range(change.first_sample, change.first_sample + n_steps * change.global_batch))
    return found


def times_read(
    mixture: Mixture, step: int, passages: Passages, *, drew: Callable[[int], object] = lambda n: None
) -> I64:
    """Return how often the steps up to `step` read each passage. It draws every sample: a million in some seconds.

    `drew` is told of every part how many samples it has.
    """
    counts = np.zeros(len(passages.begin), np.int64)
    for drawn in _drawn(mixture, step):
        variants = np.array([len(source.n_tokens) for source in mixture.sources])[drawn.dataset]
        for k, variant in sorted(set(zip(passages.dataset.tolist(), passages.variant.tolist(), strict=True))):
            mine = np.flatnonzero((passages.dataset == k) & (passages.variant == variant))
            mine = mine[np.argsort(passages.begin[mine], kind="stable")]
            counts[mine] += _holding(drawn, (drawn.dataset == k) & (drawn.epoch % variants == variant), passages, mine)
        drew(len(drawn.begin) - 1)
    return counts


def _holding(drawn: SampleSpans, spans: NDArray[np.bool_], passages: Passages, ordered: I64) -> I64:
    """Return how many of the chosen spans hold each passage, of those that are `ordered` by their beginning."""
    start, begin = drawn.start[spans], passages.begin[ordered]
    is_last = np.zeros(len(drawn.start), np.int64)
    is_last[drawn.begin[1:] - 1] = 1  # a sample's last span has one token more, which is a target alone
    latest = start + drawn.length[spans] + is_last[spans] - passages.length
    first = np.searchsorted(begin, start, side="left")
    after = np.maximum(first, np.searchsorted(begin, latest, side="right"))
    # Passages first to after - 1 are held: a sum over the changes of their number.
    change = np.bincount(first, minlength=len(begin) + 1) - np.bincount(after, minlength=len(begin) + 1)
    return np.cumsum(change)[:-1]


def _drawn(mixture: Mixture, step: int) -> Iterator[SampleSpans]:
    """Yield the spans of all samples up to `step`, in parts that lie within one segment each."""
    firsts = [segment.first_sample for segment in mixture.segments]
    for samples in trained_samples(mixture, step):
        borders = [first for first in firsts if samples.start < first < samples.stop]
        for begin, end in zip([samples.start, *borders], [*borders, samples.stop], strict=True):
            sampler = mixture.sampler(begin)
            for first in range(begin, end, AT_ONCE):
                yield sampler.draw(first, min(AT_ONCE, end - first))
