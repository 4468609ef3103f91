"""Values that double over the first steps of a run: the length of its rows, and its global batch."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Doubling:
    """A step function of the update number (0-based); `stages` lists (first step, value)."""

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
    """Return a schedule that doubles from `first` to `last` over the first `steps` steps.

    Each value is held equally long.
    """
    doublings = (last // first).bit_length() - 1
    # Of two values that begin at one step, the later one holds.
    begins = {-(-k * steps // doublings): first << k for k in range(doublings)}
    return Doubling(tuple((begins | {steps: last}).items()) if begins and steps else ((0, last),))


def halved(n: int) -> list[int]:
    """Return n and its halves down to the last whole number."""
    return [n >> k for k in range(n.bit_length()) if n >> k << k == n]


def check_doubles(small: tuple[str, int | None], large: tuple[str, int], steps_key: str) -> None:
    """Raise ValueError if the value of one key does not double to the value of another: each is (key, value)."""
    (key, first), (whole_key, whole) = small, large
    if first is None or first in halved(whole):
        return
    parts = halved(whole)[1:]
    nearest = min(parts, key=lambda n: abs(n - first), default=None)
    way_out = f"remove {key} and {steps_key}" if nearest is None else f"set {key} to {nearest}"
    raise ValueError(f"{key}={first} does not double to {whole_key}={whole}; {way_out}")
