"""What the launcher above this process was told, where it keeps a mistake to itself."""

import base64
import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL: deepspeed's, torchrun's, and Slurm's if nobody changed KillWait

LAUNCHERS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")  # deepspeed, torchrun and srun each set one


def adopt_slurms_ranks() -> None:
    """Under srun, set what deepspeed and torchrun set."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def local_ranks() -> int:
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, deepspeed, srun
    return next((int(os.environ[name]) for name in names if name in os.environ and "RANK" in os.environ), 1)


def launcher_watch() -> Callable[[], bool]:
    """A function that says whether the launcher above this rank is alive; always, if a person started this process.

    A person's process may outlive its shell; a launcher's ranks must not outlive the launcher. `deepspeed` is two
    processes, of which the lower survives the upper; over ssh there are more, and on the host where it was started it
    is found by the `pdsh` that it has for this run.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return lambda: True
    links = [(os.getpid(), os.getppid()), *_links_above(os.getppid())]
    return lambda: all(_parent(child) == parent for child, parent in links)


def _links_above(launch: int) -> list[tuple[int, int]]:
    """(process, its parent) from deepspeed's launch.py up to what must not end before it."""
    arguments = _arguments(launch)
    if "deepspeed.launcher.launch" not in arguments:
        return []
    above = [launch, _parent(launch)]
    if not is_deepspeed(_arguments(above[-1])):  # but a shell or ssh's daemon, which has a process for each connection
        while above[-1] > 1 and "sshd" not in _program(above[-1]):
            above.append(_parent(above[-1]))
    this_run = {part for part in arguments if part.startswith(("--world_info=", "--master_port="))}
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    pdsh = [pid for pid in pids if "pdsh" in _program(pid) and this_run <= set(_arguments(pid))]
    return [*pairwise(above), *((pid, _parent(pid)) for pid in pdsh)]


def grace_warning(waited: float, wrote: float) -> str:
    """What a signal to the launcher will cost, if a save takes longer than launchers wait; else an empty string.

    Training waited so many seconds for it, and one took so many to write beside training; 0 if none is written so.
    """
    save_seconds = waited + 2 * wrote  # a stop waits for the one in flight, and for its own
    if save_seconds <= GRACE_SECONDS or not any(name in os.environ for name in LAUNCHERS):
        return ""
    return (
        f"a save takes up to {save_seconds:.0f} s at a stop, and a launcher that is told to stop kills its ranks after "
        f"{GRACE_SECONDS:.0f} s: the run would fall back to the step saved before. Stop it by "
        "megagpt.time_limit_minutes, by Slurm's --signal=USR1@SECONDS or by SIGUSR1 to a rank, or lower "
        "megagpt.every.save"
    )


def hosts_of_ranks() -> list[str]:
    """The host of each rank, as the hostfile names it; empty if no `deepspeed` started this process."""
    for argument in _arguments(os.getppid()):
        if argument.startswith("--world_info="):
            slots: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(argument.partition("=")[2]))
            return [host for host, ids in slots.items() for _ in ids]
    return []


def is_deepspeed(arguments: list[str]) -> bool:
    return any(Path(part).name in ("deepspeed", "ds", "deepspeed.pt") for part in arguments[:3])


def ancestors() -> Iterator[tuple[list[str], Path]]:
    """(command line, working folder) of the processes above this one, as far as they may be read."""
    pid = os.getppid()
    while pid > 1:
        try:
            yield _arguments(pid), Path(f"/proc/{pid}/cwd").readlink()
        except OSError:
            return
        pid = _parent(pid)


def _arguments(pid: int) -> list[str]:
    """The command line of a process; none if it is gone, or another user's on a machine that hides those."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _program(pid: int) -> str:
    return next(iter(_arguments(pid)), "")


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
