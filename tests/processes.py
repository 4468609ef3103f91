"""Tests that start no process: the suite's fast part, `make test-fast`. Whether a test is one is checked as it runs."""

import multiprocessing.process
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}  # audit events


class _Watch:
    """Whether a process may be started now, and how many have been."""

    allowed, started = True, 0


def watch() -> None:
    """From here on every start of a process is counted, or fails the test that is not marked as starting one."""
    start = multiprocessing.process.BaseProcess.start

    def noticed(self: Any) -> None:  # the way "spawn" raises no audit event
        _notice(f"multiprocessing: {self.name}")
        start(self)

    multiprocessing.process.BaseProcess.start = noticed
    sys.addaudithook(lambda event, args: _notice(f"{event}{args!r}"[:300]) if event in EVENTS else None)


def _notice(what: str) -> None:
    _Watch.started += 1
    if not _Watch.allowed:
        pytest.fail(f"starts a process and is not marked so (@pytest.mark.process): {what}")


def started() -> int:
    return _Watch.started


@contextmanager
def allowed(whether: bool) -> Iterator[None]:
    before, _Watch.allowed = _Watch.allowed, whether
    try:
        yield
    finally:
        _Watch.allowed = before
