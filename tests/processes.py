"""Tests that start no process: the suite's fast part, `make test-fast`. Whether a test is one is checked as it runs."""

import multiprocessing.process
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}  # audit events


class _Watch:
    """Whether a process may be started now."""

    allowed = True


def watch() -> None:
    """From here on, starting a process fails a test that is not marked as starting one."""
    start = multiprocessing.process.BaseProcess.start

    def noticed(self: Any) -> None:  # the way "spawn" raises no audit event
        _notice(f"multiprocessing: {self.name}")
        start(self)

    multiprocessing.process.BaseProcess.start = noticed
    sys.addaudithook(lambda event, args: _notice(f"{event}{args!r}"[:300]) if event in EVENTS else None)


def _notice(what: str) -> None:
    if not _Watch.allowed:
        pytest.fail(f"starts a process and is not marked so (@pytest.mark.process): {what}")


def start_here(fixture: Callable[..., Any]) -> Callable[..., Any]:
    """Stands below @pytest.fixture: every test that uses the fixture is marked as starting processes."""
    fixture.starts_processes = True  # type: ignore[attr-defined]
    return fixture


def starts_some(fixture: Callable[..., Any]) -> bool:
    return getattr(fixture, "starts_processes", False)


@contextmanager
def allowed(whether: bool) -> Iterator[None]:
    before, _Watch.allowed = _Watch.allowed, whether
    try:
        yield
    finally:
        _Watch.allowed = before
