"""Tasks over processes: Dask's, on this machine or a cluster (dask_cluster.py), or none at all for a small job.

A task gets paths and returns nothing; what it makes, it leaves in files, on a file system that all workers see.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.executor.progress import Arguments, RunAll, progress

SMALL_BYTES = 2**24  # below it, starting processes costs more than they save


@contextmanager
def start_workers(n: int | None, scheduler: str | None, scratch: Path, *, total_bytes: int) -> Iterator[RunAll]:
    n = n or len(os.sched_getaffinity(0))
    if scheduler is None and (n == 1 or total_bytes < SMALL_BYTES):
        yield _run_here
        return
    from data_tools.executor.dask_cluster import (  # here, because Dask takes a third of a second to import
        connect,
        run_on,
    )

    with connect(n, scheduler, scratch) as client:
        yield partial(run_on, client)


def _run_here(task: Callable[..., Any], arguments: Arguments, what: str) -> list[Any]:
    return [task(*args) for args in progress(arguments, len(arguments), what)]
