"""One trial: a `megagpt train` process, its validation curve, and how it ended."""

import ctypes
import json
import math
import os
import re
import shlex
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
SSH_FAILED = 255  # exit code of ssh if it cannot reach a host, or loses it
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
    host: str = ""  # of a hostfile; the prefix is then ssh, and ends with the agent's command
    ranks: int | None = 1  # None: as many as a Slurm job has GPUs


class TrialProcess:
    """A trial that trains, or trained, in `folder`. It ends with the process that started it, and can be resumed."""

    def __init__(self, folder: Path, run_file: Path, overrides: Sequence[str], metric: str, place: Place) -> None:
        self.folder, self.metric, self.place = folder, metric, place
        self._log = folder.with_suffix(".log")
        train = [sys.executable, "-m", "megagpt", "train", str(run_file), *overrides]
        if place.ranks is not None:
            train += ["--nproc", str(place.ranks)]
        train += [*OF_EVERY_TRIAL, f"megagpt.out_dir={json.dumps(str(folder))}"]
        if place.host:
            train = [shlex.join([str(self._log), *train])]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*place.prefix, *train],
                stdin=subprocess.PIPE if place.host else subprocess.DEVNULL,
                bufsize=0,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place.environment},
                start_new_session=True,  # Ctrl-C reaches the tuner alone, which stops its trials
                preexec_fn=end_with_parent,
            )

    def curve(self) -> dict[int, float]:
        """Return the validation losses so far, by step; NaN where one was not finite."""
        rows = read_rows(self.folder / METRICS)
        return {row["step"]: _number(row[self.metric]) for row in rows if self.metric in row}

    def ended(self) -> bool:
        """Tell whether the process has ended."""
        return self._process.poll() is not None

    def keep_alive(self) -> None:
        """Tell the agent on the trial's host that the tuner lives; to be called several times a minute."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.write(b".")

    def stop(self) -> None:
        """Ask it to save and end. `wait` returns when it has."""
        if self._process.stdin is not None:  # ssh must stay until the agent has ended the trial
            self._process.stdin.close()
            return
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
        if code is None:
            return False
        return code == SAVED_AND_WANTS_RESTART or code < 0 or (bool(self.place.host) and code > 128)

    @property
    def host_is_lost(self) -> bool:
        """Tell whether ssh could not reach the trial's host, or lost it."""
        return bool(self.place.host) and self._process.returncode == SSH_FAILED

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
    if held := holder_after(folder, patience):
        raise UserError(
            f"{folder} is still in use by {held}, a trial that a killed tuner or a lost host left; stop it, and give "
            "the command again"
        )


def holder_after(folder: Path, patience: float) -> str:
    """Return who still trains in a trial's folder after `patience` seconds; empty if nobody does."""
    lock = FileLock(folder / LOCK)
    if lock.path.exists():
        try:
            lock.take(patience)
        except LockHeldError as held:
            return str(held)
        lock.release()
    return ""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def end_with_parent() -> None:
    """Let the kernel end this process with the tuner, so that a killed one leaves no trial behind."""
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
