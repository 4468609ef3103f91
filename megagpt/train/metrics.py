"""What a log line says of the steps since the last one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds since the last lap, by what they went to; what no section claims is the training step's."""

    def __init__(self) -> None:
        self._started = self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        """Seconds up to the last lap."""
        return self._began - self._started

    def spent(self, name: str) -> float:
        """Seconds of one section since the last lap."""
        return self._seconds.get(name, 0.0)

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = {"data": 0.0} | self._seconds
        seconds["step"] = now - self._began - sum(seconds.values())
        self._began, self._seconds = now, {}
        return seconds
