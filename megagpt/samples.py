"""From a sample's number to its tokens. Free of torch, so that tools that only read data start fast."""

import numpy as np
from numpy.typing import NDArray

from megagpt.sampler import Sampler, Windows
from megagpt.shards import TokenStream

DRAW = 4096  # samples whose windows are computed at once: the arithmetic is vectorized, a single one is dear


class TrainData:
    """The weighted training datasets as one endless, shuffled sequence of samples."""

    def __init__(self, streams: list[TokenStream], weights: list[float], *, seq_len: int, seed: int) -> None:
        self._streams = streams
        self.sampler = Sampler(tuple(s.n_tokens for s in streams), tuple(weights), seq_len, seed)
        self._drawn: tuple[int, Windows] | None = None

    def fill(self, first: int, rows: NDArray[np.int64]) -> None:
        for i, row in enumerate(rows):
            windows, at = self._windows(first + i)
            self._streams[windows.dataset[at]].copy(int(windows.start[at]), row)

    def epoch(self, sample: int) -> float:
        """Passes over the first dataset after so many samples of all datasets together."""
        share = self.sampler.shares[0] / sum(self.sampler.shares)
        return sample * share / self.sampler.n_windows(0)

    def _windows(self, g: int) -> tuple[Windows, int]:
        """The drawn stretch of samples that holds g, and g's place in it."""
        first = g // DRAW * DRAW
        if self._drawn is None or self._drawn[0] != first:
            self._drawn = (first, self.sampler.draw(first, DRAW))
        return self._drawn[1], g - first
