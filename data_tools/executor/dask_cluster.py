"""Run tasks in Dask's worker processes: on this machine, on a running cluster, or as Slurm jobs."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker

from data_tools.executor.progress import Arguments, Progress, listening
from megagpt.errors import UserError

CONNECT_SECONDS = 10.0
SLURM = "slurm"  # the value of --scheduler that starts workers as Slurm jobs
# without these, glibc returns each array of some MB to the kernel and asks for it again: a third of tokenizing's time
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**26, "MALLOC_TRIM_THRESHOLD_": 2**27}
REPORT_EVERY = 0.5  # seconds, of a task's progress
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


def run_on(client: Client, task: Callable[..., Any], arguments: Arguments, progress: Progress) -> list[Any]:
    """Return the RunAll of a cluster (tasks.py). Raises what a task raised, at once, and cancels the others."""
    # of this client alone, and of its tasks now: a scheduler may serve others
    topic = f"data_tools {client.id} {progress.what}"
    client.subscribe_topic(topic, lambda event: progress.set(*event[1]))
    futures = [
        client.submit(_run_in_worker, task, args, topic, number, pure=False, retries=RETRIES)
        for number, args in enumerate(arguments)
    ]
    numbers = {future.key: number for number, future in enumerate(futures)}
    results = {}
    try:
        with progress.shown():
            for done in as_completed(futures, loop=client.loop):
                results[done.key] = done.result()
                if isinstance(results[done.key], UserError):
                    raise results[done.key]
                progress.finish(numbers[done.key])
    except KilledWorker as error:
        raise UserError(
            f"worker processes died repeatedly while {progress.what}, probably out of memory; run the command again "
            "with workers=1"
        ) from error
    finally:
        client.cancel([future for future in futures if not future.done()])
        client.unsubscribe_topic(topic)
    return [results[future.key] for future in futures]


def _run_in_worker(task: Callable[..., Any], args: tuple[Any, ...], topic: str, number: int) -> Any:
    """Return a UserError instead of raising it, because Dask would retry the task, and a user's mistake stays one."""
    try:
        with listening(_Reports(topic, number)):
            return task(*args)
    except UserError as error:
        return error


class _Reports:
    """Sends a task's progress to the client now and then. A task that is tried again begins at 0, which it ignores."""

    def __init__(self, topic: str, number: int) -> None:
        self._topic, self._number, self._done, self._worker = topic, number, 0, get_worker()
        self._next = time.monotonic() + REPORT_EVERY

    def __call__(self, n: int) -> None:
        self._done += n
        if (now := time.monotonic()) >= self._next:
            self._next = now + REPORT_EVERY
            self._worker.log_event(self._topic, (self._number, self._done))
