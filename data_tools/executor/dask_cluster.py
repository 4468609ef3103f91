"""Run tasks in Dask's worker processes: on this machine, on a running cluster, or as Slurm jobs."""

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
SLURM = "slurm"  # the value of --scheduler that starts workers as Slurm jobs
# without these, glibc returns each array of some MB to the kernel and asks for it again: a third of tokenizing's time
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**26, "MALLOC_TRIM_THRESHOLD_": 2**27}
RETRIES = 2  # of a task that failed for a passing reason, such as a hiccup of a network file system


@contextmanager
def connect(n: int, scheduler: str | None, scratch: Path) -> Iterator[Client]:
    """Open a client of n new workers, or of those of the running `scheduler`.

    Raises UserError if it does not answer.
    """
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
    # Dask's profiler samples a worker's stack a hundred times a second, which takes a sixth of a core
    with dask.config.set(
        {"distributed.nanny.pre-spawn-environ": KEEP_MEMORY, "distributed.worker.profile.enabled": False}
    ):
        return LocalCluster(
            n_workers=n,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port: None would still open 8787, which may be in use
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,  # tasks bound their buffers, so Dask need not kill workers by memory
            local_directory=str(scratch),
            silence_logs=logging.CRITICAL,
        )


def _slurm(n: int) -> Any:
    """Start n workers as Slurm jobs, with the resources that dask-jobqueue's configuration names."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UserError("--scheduler slurm needs dask-jobqueue; install it with pip") from error
    try:
        cluster = SLURMCluster()
    except (ValueError, OSError) as error:
        raise UserError(
            f"--scheduler slurm: {str(error).splitlines()[0]}; describe a worker in ~/.config/dask/jobqueue.yaml under "
            "jobqueue.slurm: cores, processes, memory, queue, walltime"
        ) from error
    cluster.scale(n)
    return cluster


def run_on(client: Client, task: Callable[..., Any], arguments: Arguments, what: str) -> list[Any]:
    """Return the RunAll of a cluster (progress.py). Raises what a task raised, at once, and cancels the others."""
    futures = [client.submit(_without_retry, task, args, pure=False, retries=RETRIES) for args in arguments]
    results = {}
    try:
        for done in progress(as_completed(futures, loop=client.loop), len(futures), what):
            results[done.key] = done.result()
            if isinstance(results[done.key], UserError):
                raise results[done.key]
    except KilledWorker as error:
        raise UserError(
            f"worker processes died repeatedly while {what}, probably out of memory; run the command again with "
            "workers=1"
        ) from error
    finally:
        client.cancel([future for future in futures if not future.done()])
    return [results[future.key] for future in futures]


def _without_retry(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return a UserError instead of raising it, because Dask would retry the task, and a user's mistake stays one."""
    try:
        return task(*args)
    except UserError as error:
        return error
