"""Notice that this process should stop: a signal, the time limit, or a launcher that has died."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what Slurm and the launchers send before they kill
TIME_LIMIT = "time limit"  # a reason
HANG_UP = b"the terminal is gone (SIGHUP): training continues; kill %d saves and stops it\n"
CTRL_C = b"Ctrl-C: stopping at the next step, which is saved; Ctrl-\\ ends at once\n"


class Preemption:
    """Installs signal handlers: make one per process, in the main thread, before anything slow.

    `requested` is read at step boundaries. A second signal changes nothing, because launchers send their own after a
    terminal's. With `ctrl_c`, SIGINT counts too, unless the shell ignores it for a process in the background; a process
    that does more than train keeps Python's KeyboardInterrupt. The end of the terminal (SIGHUP) stops nothing.
    """

    def __init__(self, *, launcher_alive: Callable[[], bool] = lambda: True, ctrl_c: bool = False) -> None:
        self._began = time.monotonic()
        self.launcher_alive = launcher_alive
        self._time_limit_minutes: float | None = None
        self._signal: int | None = None
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._continue)
        if ctrl_c and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._remember)
        for number in SIGNALS:
            signal.signal(number, self._remember)
        # `megagpt train` starts ranks with these blocked, so that one that comes before they listen waits until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS, signal.SIGINT})

    def set_time_limit(self, minutes: float | None) -> None:
        """Stop when this process is `minutes` old; known only once the run file is read."""
        self._time_limit_minutes = minutes

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is None and os.environ.get("RANK", "0") == "0":
            _say(CTRL_C)
        self._signal = self._signal or number

    def _continue(self, number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            _say(HANG_UP % os.getpid())

    @property
    def reason(self) -> str:
        """Why this rank wants to stop, or an empty string."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._time_limit_minutes is not None and time.monotonic() > self._began + 60 * self._time_limit_minutes:
            return TIME_LIMIT
        if not self.launcher_alive():
            return "launcher has died"
        return ""

    @property
    def requested(self) -> bool:
        """Tell whether this rank wants to stop."""
        return bool(self.reason)


def _say(line: bytes) -> None:
    """Write to standard error, if anybody reads it; not by print(), which the signal may have interrupted."""
    with suppress(OSError):
        os.write(2, line)
