"""A run that is started twice at once, here or on two hosts: one start trains, and the other is refused."""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megagpt.checkpoint.commit import committed
from megagpt.file_lock import LOCK

Holder = dict[str, Any]  # what the lock's file says
TIMEOUT = 300.0


def refusal(starts: list[subprocess.Popen[str]], out_dir: Path, kill: Callable[[Holder], None]) -> tuple[str, Holder]:
    """Return what the refused one of two starts wrote to stderr, and who trained instead.

    That one must save a step that was not there before it was refused; then it is killed, and must end.
    """
    until = time.monotonic() + TIMEOUT
    while all(start.poll() is None for start in starts):
        _wait(until)
    refused, trains = sorted(starts, key=lambda start: start.poll() is None)
    said = refused.communicate()[1]
    assert (refused.returncode, trains.poll()) == (2, None), said
    holder = _holder(out_dir, until)
    before = committed(out_dir)
    while not set(committed(out_dir)) - set(before):
        assert trains.poll() is None, trains.communicate()
        _wait(until)
    kill(holder)
    trains.communicate(timeout=TIMEOUT)
    return said, holder


def _holder(out_dir: Path, until: float) -> Holder:
    """Wait for what the lock's file says: with --fresh the holder renames the folder, and locks it again."""
    while True:
        with suppress(OSError, ValueError):
            holder: Holder = json.loads((out_dir / LOCK).read_bytes())
            return holder
        _wait(until)


def _wait(until: float) -> None:
    assert time.monotonic() < until
    time.sleep(0.05)
