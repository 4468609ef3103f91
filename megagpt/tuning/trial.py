"""One trial: a `megagpt train` process, its validation curve, and how it ended."""

import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.errors import UserError
from megagpt.file_lock import LOCK, FileLock, LockHeldError
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.terminal import SAVED_AND_WANTS_RESTART

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What a study sets in every trial: no checkpoint but the last one, and none of what only a reader would want.
OF_EVERY_TRIAL = (
    "megagpt.every.save=0",
    "megagpt.every.sample=0",
    "megagpt.every.tasks=0",
    "megagpt.early_stopping.restore_best=false",
)


@dataclass(frozen=True)
class Place:
    """A place for one trial at a time: the command that starts it there, and its environment."""

    prefix: tuple[str, ...] = ()  # before the command, for example srun with its options
    environment: Mapping[str, str] = field(default_factory=dict)


class TrialProcess:
    """A trial that trains, or trained, in `folder`. It ends with the process that started it, and can be resumed."""

    def __init__(self, folder: Path, run_file: Path, overrides: Sequence[str], metric: str, place: Place) -> None:
        self.folder, self.metric, self.place = folder, metric, place
        command = [*place.prefix, sys.executable, "-m", "megagpt", "train", str(run_file), *overrides]
        if not place.prefix:  # a Slurm job has what it was given: several GPUs perhaps
            command += ["--nproc", "1"]
        command += [*OF_EVERY_TRIAL, f"megagpt.out_dir={json.dumps(str(folder))}"]
        self._log = folder.with_suffix(".log")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place.environment},
                start_new_session=True,  # Ctrl-C reaches the tuner alone, which stops its trials
                preexec_fn=_end_with_parent,
            )

    def curve(self) -> dict[int, float]:
        """Return the validation losses so far, by step; NaN where one was not finite."""
        rows = read_rows(self.folder / METRICS)
        return {row["step"]: _number(row[self.metric]) for row in rows if self.metric in row}

    def ended(self) -> bool:
        """Tell whether the process has ended."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to save and end. `wait` returns when it has."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        """Wait for its end; kill it if it takes longer than `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def was_interrupted(self) -> bool:
        """Tell whether it saved and wants to be resumed, or was killed."""
        code = self._process.returncode
        return code == SAVED_AND_WANTS_RESTART or (code is not None and code < 0)

    def failure(self) -> str | None:
        """Return why it failed, in its own words; None if it trained to its end."""
        if self._process.returncode == 0:
            return None
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if re.match(r"(error: |\w*(Error|Exception)\b)", line)] or lines[-1:]
            if said:
                return said[-1].removeprefix("error: ")
        return f"it ended with code {self._process.returncode}"


def remove_checkpoints(folder: Path) -> None:
    """Delete a trial's checkpoints, and keep its curves."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def wait_until_free(folder: Path, patience: float) -> None:
    """Wait for a trial that still saves after its tuner was killed. Raises UserError if it does not end."""
    lock = FileLock(folder / LOCK)
    if not lock.path.exists():
        return
    try:
        lock.take(patience)
    except LockHeldError as held:
        raise UserError(
            f"{folder} is still in use by {held}, a trial that a killed tuner left; stop it, and give the command again"
        ) from None
    lock.release()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _end_with_parent() -> None:
    """Let the kernel end this process with the tuner, so that a killed one leaves no trial behind."""
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
