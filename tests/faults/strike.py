"""Faults that strike a rank at a chosen point of a save: armed in the rank by Python's audit events, so that product
code has no seam for them.

A file is written as NAME or, by us, as NAME.tmp which is renamed. `before` it is opened, when it is `half` written,
and right `after` it is whole.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

TARGETS = {
    "model": "*model_states.pt",
    "optim": "*optim_states.pt",
    "rng": "rng.*.json",
    "manifest": "manifest.*.json",
    "COMMIT": "COMMIT",
    "latest": "latest",
}
PHASES = ("before", "half", "after")


def signal_to(pid: int, fault_at: Path, number: int = signal.SIGKILL) -> Callable[[], None]:
    def strike() -> None:
        fault_at.touch()
        os.kill(pid, number)

    return strike


@dataclass(frozen=True)
class InSave:
    """Arms `strike` on this rank at one phase of writing one of TARGETS, or of the rotation, the first time."""

    target: str
    phase: str
    strike: Callable[[], None]

    def arm(self) -> None:
        if self.target == "rotation":
            _at_rotation(self.phase, self.strike)
        elif self.target in ("model", "optim"):
            _at_torch_save(TARGETS[self.target], self.phase, self.strike)
        else:
            _at_small_file(TARGETS[self.target], self.phase, self.strike)


def _at_torch_save(pattern: str, phase: str, strike: Callable[[], None]) -> None:
    original, struck = torch.save, False

    def save(state: Any, file: Any, *args: Any, **options: Any) -> None:
        nonlocal struck
        path = Path(getattr(file, "name", file))
        ours = not struck and fnmatch(path.name, pattern)
        struck = struck or ours
        if ours and phase == "before":
            strike()
        original(state, file, *args, **options)
        if ours and hasattr(file, "flush"):
            file.flush()
        if ours and phase == "half":
            os.truncate(path, path.stat().st_size // 2)
        if ours and phase != "before":
            strike()

    torch.save = save


def _at_small_file(pattern: str, phase: str, strike: Callable[[], None]) -> None:
    waiting, whole = True, False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal waiting, whole
        if not waiting:
            return
        now = whole  # the first thing that happens after it was written
        if event == "open" and isinstance(args[0], str) and _writes(args):
            name = Path(args[0]).name
            if fnmatch(name.removesuffix(".tmp"), pattern):
                now = now or phase == "before"
                if not name.endswith(".tmp"):  # written in place, as DeepSpeed does: opening it empties it
                    now, whole = now or phase == "half", phase == "after"
        elif event == "os.rename" and fnmatch(Path(os.fsdecode(args[1])).name, pattern):
            now, whole = now or phase == "half", phase == "after"
        if not now:
            return
        waiting = False
        if phase == "half":
            half = 0 if event == "open" else os.path.getsize(args[0]) // 2
            os.close(os.open(args[0], os.O_WRONLY | os.O_CREAT))
            os.truncate(args[0], half)
        strike()

    sys.addaudithook(hook)


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2] or 0
    return any(letter in (mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))


def _at_rotation(phase: str, strike: Callable[[], None]) -> None:
    """Before an old step loses its COMMIT, when some of its files are gone, after its folder is."""
    state, n_gone = "waiting", 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal state, n_gone
        if state == "struck":
            return
        begins = event == "os.remove" and Path(os.fsdecode(args[0])).name == "COMMIT"
        n_gone += begins or (event == "os.remove" and n_gone > 0)
        if state == "whole" or (phase, n_gone) in (("before", 1), ("half", 4)):
            state = "struck"
            strike()
        elif event == "os.rmdir" and n_gone and phase == "after":
            state = "whole"

    sys.addaudithook(hook)


def at_most(n_bytes: int) -> None:
    """A disk that takes no file longer than this: what a full one looks like to one rank."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
