"""Tasks over processes: Dask on this machine, Dask on a cluster, or none at all for a small job.

A task gets paths and returns nothing; what it makes, it leaves in files, on a file system that all workers see.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker, LocalCluster, as_completed
from tqdm import tqdm

from megagpt.errors import UserError

SMALL_BYTES = 2**24  # below it, starting processes costs more than they save
CONNECT_SECONDS = 10.0
SLURM = "slurm"  # as --scheduler: workers as batch jobs
RETRIES = 2  # of a task that failed otherwise than by the user's fault, such as a network file system's hiccup

Arguments = Sequence[tuple[Any, ...]]
RunAll = Callable[[Callable[..., Any], Arguments, str], list[Any]]
"""run_all(task, arguments, what): task(*arguments[i]) for every i, in any order; the results in order."""


@contextmanager
def start_workers(n: int | None, scheduler: str | None, scratch: Path, *, total_bytes: int) -> Iterator[RunAll]:
    n = n or len(os.sched_getaffinity(0))
    if scheduler is None and (n == 1 or total_bytes < SMALL_BYTES):
        yield _run_here
        return
    with _connect(n, scheduler, scratch) as client:
        yield partial(_run_on, client)


def _run_here(task: Callable[..., Any], arguments: Arguments, what: str) -> list[Any]:
    return [task(*args) for args in _progress(arguments, len(arguments), what)]


@contextmanager
def _connect(n: int, scheduler: str | None, scratch: Path) -> Iterator[Client]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler not in (None, SLURM):
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no Dask scheduler answers at --scheduler {scheduler} ({error}); start one with `dask scheduler`"
            ) from error
        with client:
            yield client
        return
    started = _slurm(n) if scheduler == SLURM else _local(n, scratch)
    with started as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _local(n: int, scratch: Path) -> LocalCluster:
    return LocalCluster(
        n_workers=n,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # any free port: None would still open 8787, which may be taken
        scheduler_kwargs={"dashboard": False},
        memory_limit=0,  # tasks bound their buffers; killing a worker at some share of the memory helps nobody
        local_directory=str(scratch),
        silence_logs=logging.CRITICAL,
    )


def _slurm(n: int) -> Any:
    """n workers as batch jobs, each as dask-jobqueue's own file describes it (cores, memory, queue, walltime)."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UserError("--scheduler slurm needs dask-jobqueue; install it with pip") from error
    try:
        cluster = SLURMCluster()
    except (ValueError, OSError) as error:
        raise UserError(
            f"--scheduler slurm: {error}; describe a worker in ~/.config/dask/jobqueue.yaml under jobqueue.slurm: "
            "cores, processes, memory, queue, walltime"
        ) from error
    cluster.scale(n)
    return cluster


def _run_on(client: Client, task: Callable[..., Any], arguments: Arguments, what: str) -> list[Any]:
    futures = [client.submit(_without_retry, task, args, pure=False, retries=RETRIES) for args in arguments]
    results = {}
    try:
        for done in _progress(as_completed(futures, loop=client.loop), len(futures), what):
            results[done.key] = done.result()  # raises what the task raised, at once
            if isinstance(results[done.key], UserError):
                raise results[done.key]
    except KilledWorker as error:
        raise UserError(
            f"worker processes died again and again while {what}, likely for want of memory; what is finished is "
            "kept: set workers=1 and give the same command again"
        ) from error
    finally:
        client.cancel([future for future in futures if not future.done()])
    return [results[future.key] for future in futures]


def _without_retry(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A user's mistake stays one however often it is tried, so it is handed back rather than raised."""
    try:
        return task(*args)
    except UserError as error:
        return error


def _progress(items: Any, total: int, what: str) -> Any:
    """A bar where there is a terminal to draw it on, for what lasts longer than two seconds."""
    return tqdm(items, total=total, desc=what, unit="task", delay=2, mininterval=0.5, disable=None)
