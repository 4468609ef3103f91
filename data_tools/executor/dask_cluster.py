"""Processes to run tasks in: Dask's, on this machine, on a running cluster, or as batch jobs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, as_completed

from data_tools.executor.progress import Arguments, progress
from megagpt.errors import UserError

CONNECT_SECONDS = 10.0
SLURM = "slurm"  # as --scheduler: workers as batch jobs
# glibc would hand each array of some MB back to the kernel and fetch it anew: a third of the time of tokenizing
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**26, "MALLOC_TRIM_THRESHOLD_": 2**27}
RETRIES = 2  # of a task that failed otherwise than by the user's fault, such as a network file system's hiccup


@contextmanager
def connect(n: int, scheduler: str | None, scratch: Path) -> Iterator[Client]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler not in (None, SLURM):
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no Dask scheduler answers at --scheduler {scheduler} ({str(error).splitlines()[0]}); start one with "
                "`dask scheduler`, and give its address, such as tcp://host:8786"
            ) from error
        with client:
            yield client
        return
    started = _slurm(n) if scheduler == SLURM else _local(n, scratch)
    with started as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _local(n: int, scratch: Path) -> LocalCluster:
    # Dask's profiler looks at a worker's stack a hundred times a second: a sixth of the processor
    with dask.config.set(
        {"distributed.nanny.pre-spawn-environ": KEEP_MEMORY, "distributed.worker.profile.enabled": False}
    ):
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
            f"--scheduler slurm: {str(error).splitlines()[0]} describe a worker in ~/.config/dask/jobqueue.yaml under "
            "jobqueue.slurm: cores, processes, memory, queue, walltime"
        ) from error
    cluster.scale(n)
    return cluster


def run_on(client: Client, task: Callable[..., Any], arguments: Arguments, what: str) -> list[Any]:
    futures = [client.submit(_without_retry, task, args, pure=False, retries=RETRIES) for args in arguments]
    results = {}
    try:
        for done in progress(as_completed(futures, loop=client.loop), len(futures), what):
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
