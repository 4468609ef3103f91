"""Real ranks, forked by a launcher of their own from one process that has imported everything: a launch costs seconds.

The launcher does what `deepspeed` and `torchrun` do: it waits, and when one rank fails it ends the others. A fault is
armed inside the rank that it strikes; product code knows nothing of it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import free_port

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL, as DeepSpeed's launcher
ORPHAN_SECONDS = 60.0  # by then no rank may be left of a job whose launcher is gone
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Blow:
    """A signal from outside: to whom ("0", "1", ..., "launcher", "ranks", "group" as a terminal's Ctrl-C), and when."""

    victim: str
    when: float | str  # seconds after the start, or a text that the ranks print
    number: int = signal.SIGKILL

    def due(self, began: float, log: Path) -> bool:
        if isinstance(self.when, str):
            return self.when.encode() in log.read_bytes()
        return time.time() - began > self.when

    def strike(self, launcher: int, ranks: list[int]) -> None:
        if self.victim == "group":
            os.killpg(launcher, self.number)
            return
        victims = {"launcher": [launcher], "ranks": ranks}.get(self.victim) or [ranks[int(self.victim)]]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.number)


@dataclass(frozen=True)
class Ended:
    """How a job came to its end."""

    codes: list[int | None]  # of each rank; negative: by that signal; None: it had to be killed by us
    text: str  # what the ranks printed
    seconds: float  # from the fault, or the start, until nothing was left
    orphans: int = 0  # ranks that were still there long after their launcher
    hung: bool = False

    @property
    def code(self) -> int:
        """As a launcher would pass it on: of the first rank that failed."""
        return next((code if code is not None else 1 for code in self.codes if code != 0), 0)


def adopt_orphans() -> None:
    """Processes whose launcher dies become children of this one, so that their end can be seen."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def launch(
    program: Callable[[], int],
    folder: Path,
    *,
    n_ranks: int = 2,
    arm: Callable[[int], None] = lambda rank: None,
    blow: Blow | None = None,
    timeout: float = 120.0,
) -> Ended:
    """Run `program` on every rank; `arm(rank)` goes before it.

    `folder` takes the output and `fault_at`, which a fault touches when it strikes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, struck = folder / "output", folder / "fault_at"
    struck.unlink(missing_ok=True)
    log.write_bytes(b"")
    read_end, write_end = os.pipe()
    began = time.time()
    launcher = os.fork()
    if launcher == 0:
        os.close(read_end)
        _as_launcher(program, n_ranks, arm, log, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as told:
        ranks = [int(pid) for pid in told.readline().split()]
        while _alive(launcher) and time.time() < began + timeout:
            if blow is not None and blow.due(began, log):
                struck.touch()
                blow.strike(launcher, ranks)
                blow = None
            time.sleep(0.02)
        if hung := _alive(launcher):
            _end([launcher, *ranks])
        left = [] if hung else _wait(ranks, ORPHAN_SECONDS)
        _end(left)
        reported = [int(code) for code in told.readline().split()]
    codes: list[int | None] = list(reported) if reported else [_collected.pop(pid, None) for pid in ranks]
    since = struck.stat().st_mtime if struck.exists() else began
    return Ended(codes, log.read_text(errors="replace"), time.time() - since, orphans=len(left), hung=hung)


_collected: dict[int, int] = {}  # exit codes of adopted ranks


def _wait(pids: list[int], timeout: float) -> list[int]:
    """Those that are still alive after so long."""
    until, left = time.monotonic() + timeout, list(pids)
    while left and time.monotonic() < until:
        left = [pid for pid in left if _alive(pid)]
        time.sleep(0.02)
    return left


def _alive(pid: int) -> bool:
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _collected[pid] = os.waitstatus_to_exitcode(status)
        return not found
    except ChildProcessError:  # not ours: its launcher waits for it, or has
        return Path(f"/proc/{pid}").exists()


def _end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait(pids, 10)


def _as_launcher(program: Callable[[], int], n_ranks: int, arm: Callable[[int], None], log: Path, tell: int) -> None:
    """The launcher's life; never returns."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a campaign that is ended leaves nothing
    port, ranks = free_port(), {}
    for rank in range(n_ranks):
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            _as_rank(program, rank, n_ranks, port, arm, log)
        ranks[pid] = rank
    os.write(tell, (" ".join(map(str, ranks)) + "\n").encode())

    def pass_on(number: int, frame: object) -> None:
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    codes: dict[int, int] = {}
    left, killing_at = set(ranks), None
    while left:
        for pid in list(left):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                left.remove(pid)
                codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and killing_at is None:
            killing_at = time.monotonic() + GRACE_SECONDS
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if killing_at is not None and time.monotonic() > killing_at:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    os.write(tell, (" ".join(str(codes[r]) for r in range(n_ranks)) + "\n").encode())
    os._exit(0)


def _as_rank(
    program: Callable[[], int], rank: int, n_ranks: int, port: int, arm: Callable[[int], None], log: Path
) -> None:
    """One rank's life, in a process of its own; never returns."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n_ranks),
            LOCAL_WORLD_SIZE=str(n_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="faults",  # there is a launcher above: watch it
            GLOO_SOCKET_IFNAME="lo",
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background had it ignored
        arm(rank)
        code = program()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
