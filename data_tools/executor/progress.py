"""Show how far the tasks of a stage are: a bar on a terminal, and otherwise a line now and then, as for a log.

A task calls `advance` with what it has read. Where it runs, somebody listens: this process, or a Dask worker that
passes it on (dask_cluster.py). A thread draws, so that the bar moves while this process waits or computes.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from time import monotonic
from typing import Any

from tqdm import tqdm

from data_tools.formatting import format_bytes

Arguments = Sequence[tuple[Any, ...]]
SHOWN_AFTER = 1.0  # seconds: a shorter stage shows nothing
DRAWN_EVERY, LOGGED_EVERY = 0.5, 30.0  # seconds
DEFAULT_COLUMNS = 80  # of a terminal that does not tell

_listener: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)


def warn(text: str) -> None:
    """Print a warning at once, above the progress bars."""
    note(f"warning: {text}")


def note(text: str) -> None:
    """Print a line on standard error at once, above the progress bars."""
    tqdm.write(text, file=sys.stderr)


def advance(n: int) -> None:
    """Count n more bytes, or what the stage's sizes are in, as read by the task that runs here."""
    if (listener := _listener.get()) is not None:
        listener(n)


@contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Let `listener` receive what a task advances by."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """The state of a stage: how much of each task is done. A task that reports nothing counts when it ends."""

    def __init__(self, what: str, sizes: Sequence[int], *, unit: str = "task", already: int = 0) -> None:
        self.what, self.unit, self.already = what, unit, already
        self._sizes, self._done = list(sizes), [0] * len(sizes)
        self.total, self.n = already + sum(sizes), already

    def set(self, task: int, done: int) -> None:
        """Note how much of a task is done: never more than its size, which is an estimate, nor less than before."""
        done = max(self._done[task], min(done, self._sizes[task]))
        self.n += done - self._done[task]
        self._done[task] = done

    def add(self, task: int, n: int) -> None:
        self.set(task, self._done[task] + n)

    def finish(self, task: int) -> None:
        self.set(task, self._sizes[task])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show this progress from a thread until the block ends, and then remove it."""
        over = Event()
        draw = _draw if sys.stderr.isatty() else _log
        thread = Thread(target=draw, args=(self, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def __str__(self) -> str:
        if self.total <= 1:
            return self.what
        counts = (f"{self.n:,}", f"{self.total:,} {self.unit}s")
        if self.unit == "B":
            counts = (format_bytes(self.n), format_bytes(self.total))
        return f"{self.what}: {100 * self.n // self.total}% ({counts[0]} of {counts[1]})"


def watched(what: str) -> AbstractContextManager[None]:
    """Show how long work runs that reports nothing."""
    return Progress(what, [1]).shown()


def _draw(progress: Progress, over: Event) -> None:
    """Draw a bar; of a single task that reports nothing, only the time."""
    start = monotonic()
    if over.wait(SHOWN_AFTER):
        return
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
    with tqdm(
        desc=progress.what,
        total=progress.total,
        initial=progress.already,
        unit=progress.unit,
        unit_scale=progress.unit != "task",
        dynamic_ncols=columns > 0,
        ncols=None if columns else DEFAULT_COLUMNS,
        bar_format="{desc}: {elapsed}" if progress.total <= 1 else None,
        smoothing=0,
        leave=False,
    ) as bar:
        bar.start_t -= monotonic() - start
        while True:
            bar.n = progress.n
            bar.refresh()
            if over.wait(DRAWN_EVERY):
                return


def _log(progress: Progress, over: Event) -> None:
    """Print a line now and then, with the speed since the start and the time that is left."""
    start = monotonic()
    while not over.wait(LOGGED_EVERY):
        spent, done = monotonic() - start, progress.n - progress.already
        left = f", about {(progress.total - progress.n) / done * spent:,.0f} s left" if done > 0 else ""
        speed = f", {format_bytes(done / spent)}/s" if progress.unit == "B" else ""
        note(f"{progress}, {spent:,.0f} s{speed}{left}")
