"""Choose where tasks run: in Dask's processes (dask_cluster.py), or in this process if the job is small.

A task gets paths and leaves its output in files, on a file system that all workers share.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.executor.progress import Arguments, Progress, listening
from data_tools.executor.tasks import RunAll

SMALL_BYTES = 2**24  # of input: below it, starting processes takes longer than they save


@contextmanager
def start_workers(n: int | None, scheduler: str | None, scratch: Path, *, total_bytes: int) -> Iterator[RunAll]:
    """Start `n` workers (one per core if None), or connect to a scheduler's; yields the function that runs tasks."""
    n = n or len(os.sched_getaffinity(0))
    if scheduler is None and (n == 1 or total_bytes < SMALL_BYTES):
        yield _run_here
        return
    # imported here, because Dask takes a third of a second
    from data_tools.executor.dask_cluster import connect, run_on

    with connect(n, scheduler, scratch) as client:
        yield partial(run_on, client)


def _run_here(task: Callable[..., Any], arguments: Arguments, progress: Progress) -> list[Any]:
    results = []
    with progress.shown():
        for number, args in enumerate(arguments):
            with listening(partial(progress.add, number)):
                results.append(task(*args))
            progress.finish(number)
    return results
