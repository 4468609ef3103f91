"""Run a command on several ranks of this machine: for `megagpt train`, and for commands that train in new processes.

torchrun starts ranks too, but ends with code 1 whichever code they ended with, 75 too, and prints a report of its own.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from tempfile import TemporaryFile
from threading import Thread
from types import FrameType
from typing import IO, Self

from megagpt.distributed.rank_variables import ranks_variables, without_launcher
from megagpt.errors import UserError
from megagpt.terminal import MISTAKE, SAVED_AND_WANTS_RESTART, print_error
from megagpt.train.run_log import typed_command

# Seconds in which ranks end that found the same mistake as the first one: rank 0 prints it for all.
FIND_THE_SAME = 10.0
LONGEST_COMMAND = 10_000  # characters of it that ranks are told; Linux takes 128 KiB in a variable
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class LocalRanks:
    """The ranks of one launch, each a process. Use it in a `with` block; the ranks that then still run are killed.

    `blocked`: signals that wait, in each rank, until it unblocks them, as train.preemption does.
    """

    def __init__(
        self,
        n_ranks: int,
        command: Sequence[str],
        *,
        output: IO[str] | None = None,
        errors: IO[str] | None = None,
        blocked: Collection[signal.Signals] = (),
    ) -> None:
        self._n_ranks, self._command, self._output, self._errors = n_ranks, command, output, errors
        self._blocked, self._signals = blocked, list[int]()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: SimpleQueue[tuple[int, int]] = SimpleQueue()  # (rank, exit code), in the order of their ends

    def __enter__(self) -> Self:
        port = free_port()
        try:
            for rank in range(self._n_ranks):
                self._start(rank, port)
        except BaseException:  # also a signal that ends this command: __exit__ is not called
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def signal(self, number: int) -> None:
        """Send a signal to every rank that runs, and to those that are still to be started."""
        self._signals.append(number)
        for process in self._processes:
            process.send_signal(number)

    def wait(self) -> tuple[int, int]:
        """Wait for the ranks; return (rank, exit code) of the first that failed, or of rank 0.

        It returns before all have ended if the others cannot continue without the one that failed.
        """
        first, until = (0, 0), None
        for _ in self._processes:
            try:
                rank, code = self._ended.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except Empty:
                break
            if code == 0 or first[1]:
                continue
            first = rank, code
            # After a save all ranks end by themselves, however long one of them still writes.
            if code != SAVED_AND_WANTS_RESTART:
                until = time.monotonic() + (FIND_THE_SAME if code == MISTAKE else 0.0)
        return first

    def _start(self, rank: int, port: int) -> None:
        command = typed_command()[:LONGEST_COMMAND]
        own = without_launcher(os.environ) | ranks_variables(rank, self._n_ranks, port, command=command)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)  # which the new process inherits
        try:
            process = subprocess.Popen(self._command, env=own, stdout=self._output, stderr=self._errors)
            self._processes.append(process)
        except OSError as error:
            raise UserError(f"rank {rank} of {self._n_ranks} cannot be started: {error}; start fewer ranks") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        Thread(target=self._watch, args=(rank, process), daemon=True).start()
        for number in self._signals:  # that came before it was started; a second one changes nothing
            process.send_signal(number)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._ended.put((rank, process.wait()))

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def train_on_ranks(n_ranks: int, command: Sequence[str], *, stopped: Callable[[], bool] = lambda: False) -> int:
    """Run a training command on n_ranks until they end; return the exit code of the first that failed.

    SIGTERM, Ctrl-C and SIGUSR1 are passed on, upon which the ranks save and end with 75; a rank that still starts gets
    them once it listens. `stopped`: whether one came before.
    """
    ranks = LocalRanks(n_ranks, command, blocked=FORWARDED)
    with _passing_on(ranks):  # before the first rank starts, so that no signal is lost
        if stopped():
            return SAVED_AND_WANTS_RESTART
        with ranks:
            rank, code = ranks.wait()
    if code in (0, MISTAKE, SAVED_AND_WANTS_RESTART):
        return code
    print_error(
        f"error: {_end_of(rank, code)}; the other ranks were ended. The same command resumes from the last save"
    )
    return 128 - code if code < 0 else code


def on_ranks(n_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` on n_ranks until it ends; SIGTERM or Ctrl-C ends the ranks first."""
    command = [sys.executable, "-m", module, *arguments]
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
            with LocalRanks(n_ranks, command, output=output, errors=errors) as ranks:
                _, code = ranks.wait()
            return subprocess.CompletedProcess(command, code, *(_content(file) for file in (output, errors)))
    finally:
        signal.signal(signal.SIGTERM, before)


def failure_of(done: subprocess.CompletedProcess[str]) -> UserError:
    """Return the error of the rank that reported one, or the end of the output."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return UserError(errors[0].removeprefix("error: ") if errors else f"a rank failed:\n{done.stderr[-3000:]}")


def free_port() -> int:
    """Return a port that nobody listens on, below those which the kernel gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


@contextmanager
def _passing_on(ranks: LocalRanks) -> Iterator[None]:
    """Pass signals on to the ranks. The end of the terminal (SIGHUP), which reaches them too, ends nothing."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks.signal(number)

    handlers = dict.fromkeys(FORWARDED, pass_on) | {signal.SIGHUP: lambda number, frame: None}
    # A shell that starts a program in the background has it ignore Ctrl-C, and nohup SIGHUP.
    before = {n: signal.signal(n, act) for n, act in handlers.items() if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_of(rank: int, code: int) -> str:
    if code == -signal.SIGKILL:
        return f"rank {rank} was killed (SIGKILL), as by the kernel when memory is full: see `dmesg`"
    if code < 0:
        return f"rank {rank} was ended by {signal.Signals(-code).name}"
    return f"rank {rank} ended with exit code {code}, see above"


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
