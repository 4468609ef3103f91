"""Remembers that this process was asked to stop: a signal, the time limit, or a launcher that has died."""

import signal
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what Slurm and the launchers send before they kill


class Preemption:
    """Install once per process, from the main thread, before anything slow; `requested` is read at step boundaries."""

    def __init__(self, *, launcher_alive: Callable[[], bool] = lambda: True) -> None:
        self._began = time.monotonic()
        self._launcher_alive = launcher_alive
        self.time_limit_minutes: float | None = None  # known once the run file is read
        self._signal: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    @property
    def reason(self) -> str:
        """Why this rank wants to stop, or an empty string."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.time_limit_minutes is not None and time.monotonic() > self._began + 60 * self.time_limit_minutes:
            return "time limit"
        if not self._launcher_alive():
            return "launcher has died"
        return ""

    @property
    def requested(self) -> bool:
        return bool(self.reason)
