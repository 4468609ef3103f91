"""Values that double over the first steps of a run: the length of its rows, and its global batch."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Doubling:
    """A whole number for each step (0-based): `stages` are (first step, number) in order, and begin at step 0."""

    stages: tuple[tuple[int, int], ...]

    def at(self, step: int) -> int:
        return next(number for first, number in reversed(self.stages) if first <= step)

    def total(self, steps: int) -> int:
        """Return the sum over the first `steps` steps."""
        ends = [*(first for first, _ in self.stages[1:]), steps]
        return sum(max(0, min(end, steps) - first) * n for (first, n), end in zip(self.stages, ends, strict=True))

    def steps_to(self, total: int) -> int:
        """Return the fewest steps whose sum is at least `total`."""
        for (first, n), (after, _) in pairwise(self.stages):
            if self.total(after) >= total:
                return first - (self.total(first) - total) // n
        first, n = self.stages[-1]
        return first - (self.total(first) - total) // n


def doubling(steps: int, first: int, last: int) -> Doubling:
    """Return what doubles from `first` to `last` in the first steps, each value for as many of them."""
    doublings = (last // first).bit_length() - 1
    # Of two values that begin at one step, the later one holds.
    begins = {-(-k * steps // doublings): first << k for k in range(doublings)}
    return Doubling(tuple((begins | {steps: last}).items()) if begins and steps else ((0, last),))


def halved(n: int) -> list[int]:
    """Return n, n / 2, n / 4, ... as far as these are whole numbers: what doubles to n."""
    return [n >> k for k in range(n.bit_length()) if n >> k << k == n]
