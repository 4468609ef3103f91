"""End a rank that hangs: one that reaches no step boundary in time, or none after its launcher has died.

Before it ends, the stack of each of its threads is written to a file.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Self

from megagpt.terminal import print_error

TICK = 1.0  # seconds between two checks
# Seconds from writing the stacks to the end: a rank that ends breaks the collective in which another one hangs, which
# then could not write its own stacks.
GRACE = 3.0
OUTLIVES = 50.0  # seconds without a step boundary that end a rank whose launcher has died
TIMES_THE_LAST_STEP = 10  # a step may take this many times as long as the one before it, where that exceeds the timeout


class Watchdog:
    """One for each rank. Inside `with`, `beat` must be called at every step boundary.

    The first step, which compiles, is not timed. A thread watches, so a wait that releases Python's lock is seen, as in
    collectives and reads. Time in which the whole process is suspended does not count. A launcher that dies is noticed
    at any time, timed or not.
    """

    def __init__(self, timeout: float, rank: int, stacks: Path, launcher_alive: Callable[[], bool]) -> None:
        """`timeout` in seconds, 0 for none; `stacks`: the file that the stacks are written to."""
        self._launcher_alive, self._ending, self._alone = launcher_alive, False, 0.0
        self._timeout, self._rank, self._stacks = timeout, rank, stacks
        self._ended = Event()
        self._step, self._timed, self._idle, self._allowed = 0, False, 0.0, timeout
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, step: int, *, ending: bool) -> None:
        """Note the boundary after this step; with `ending`, all ranks save now, and that save is not cut short."""
        now = time.monotonic()
        self._allowed = max(self._timeout, TIMES_THE_LAST_STEP * (now - self._began))
        self._step, self._began, self._idle, self._timed = step, now, 0.0, True
        self._alone, self._ending = 0.0, ending  # the next boundary stops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop timing for work that may take long between two steps; the process group's own timeout holds there."""
        timed, self._timed = self._timed, False
        yield
        self._began, self._idle, self._timed = time.monotonic(), 0.0, timed

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            passed = min(now - looked, 2 * TICK)
            looked = now
            self._idle += passed
            if self._timeout > 0.0 and self._timed and self._idle > self._allowed:
                self._end(
                    f"reached no step boundary for {self._idle:.0f} s after step {self._step}",
                    "; if a step takes that long, raise megagpt.guards.hang_timeout",
                )
            self._alone = 0.0 if self._launcher_alive() else self._alone + passed
            if self._alone > OUTLIVES and not self._ending:  # read last: the boundary may come while one looks
                self._end(f"reached no step boundary for {self._alone:.0f} s after its launcher died")

    def _end(self, reason: str, way_out: str = "") -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.5 * GRACE)  # SIGALRM ends us if the disk hangs, too
        try:
            with self._stacks.open("w") as file:
                file.write(f"rank {self._rank}, process {os.getpid()}, {self._idle:.0f} s after step {self._step}:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        message = (
            f"error: hang: rank {self._rank} {reason} and is stopped; the stacks of its threads are in {self._stacks}. "
            f"The same command resumes from the last checkpoint{way_out}"
        )
        print_error(message)
        time.sleep(GRACE)
        os._exit(1)
