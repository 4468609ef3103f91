"""Remembers that this process was asked to stop: a signal, the time limit, or a launcher that has died."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what Slurm and the launchers send before they kill


class Preemption:
    """Install once per process, from the main thread; `requested` is read at step boundaries.

    A launcher's ranks stop when it has died; a process that a person started may outlive the shell it came from.
    """

    def __init__(self, time_limit_minutes: float | None = None, *, has_launcher: bool = False) -> None:
        self._deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes else None
        self._launcher = os.getppid() if has_launcher else None
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
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "time limit"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "launcher has died"
        return ""

    @property
    def requested(self) -> bool:
        return bool(self.reason)
