"""Read what the launcher above a rank tells without its variables: its command line, and whether it lives.

Ranks read the launcher's own command line to catch mistakes that it ignores, such as a missing hostfile, and watch its
processes, because a rank must not outlive its launcher. torch is not imported here: pretraining needs this module
before it is loaded.
"""

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from megagpt.distributed.rank_variables import OTHER_LAUNCHERS, OURS

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL: deepspeed's, torchrun's, and Slurm's if nobody changed KillWait

# Each launcher sets one: deepspeed, torchrun, srun, mpirun and mpiexec.
LAUNCHERS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", *(other.rank for other in OTHER_LAUNCHERS))


def launcher_watch() -> Callable[[], bool]:
    """Return a function that tells whether the launcher above this rank is alive.

    It always returns True if a person started this process: such a process may outlive its shell, but a launcher's
    ranks must not outlive the launcher.
    """
    if not any(name in os.environ for name in (*LAUNCHERS, OURS)):
        return lambda: True
    links = [(os.getpid(), os.getppid()), *_links_above(os.getppid())]
    # An orphan gets another parent, so the launcher lives as long as every process still has the parent it had.
    return lambda: all(_parent(child) == parent for child, parent in links)


def _links_above(launch: int) -> list[tuple[int, int]]:
    """Return (process, its parent) from deepspeed's launch.py (pid `launch`) up to the process that must outlive it.

    `deepspeed` is two processes, and the lower one, launch.py, survives the upper. Over ssh there are more: on a remote
    host the chain ends at sshd, and on the host where deepspeed was started its `pdsh` for this run stands for it.
    """
    arguments = _arguments(launch)
    if "deepspeed.launcher.launch" not in arguments:
        return []
    above = [launch, _parent(launch)]
    # The parent is a shell or sshd, which has a process for each connection: climb to that process.
    if not is_deepspeed(_arguments(above[-1])):
        while above[-1] > 1 and "sshd" not in _program(above[-1]):
            above.append(_parent(above[-1]))
    # Both deepspeed and pdsh get this run's hosts and port as arguments, which tell its pdsh from another run's.
    this_run = {option for option in arguments if option.startswith(("--world_info=", "--master_port="))}
    pdsh = [pid for pid in psutil.pids() if "pdsh" in _program(pid) and this_run <= set(_arguments(pid))]
    return [*pairwise(above), *((pid, _parent(pid)) for pid in pdsh)]


def grace_warning(waited: float, wrote: float) -> str:
    """Warn that a launcher kills its ranks before a save at a stop is complete; empty if the save is fast enough.

    `waited` is how many seconds training waited for a save, `wrote` how many an asynchronous write took (0 without).
    """
    save_seconds = waited + 2 * wrote  # a stop waits for the write in flight, and for its own
    if save_seconds <= GRACE_SECONDS or not any(name in os.environ for name in LAUNCHERS):
        return ""
    return (
        f"a save takes up to {save_seconds:.0f} s at a stop, and a launcher that is told to stop kills its ranks after "
        f"{GRACE_SECONDS:.0f} s: the run would fall back to the step saved before. Stop it by "
        "megagpt.time_limit_minutes, by Slurm's --signal=USR1@SECONDS or by SIGUSR1 to a rank, or lower "
        "megagpt.every.save"
    )


def torchruns_agent() -> str:
    """Return what tells the torchrun above this process from every other; empty without one.

    It is the same in all attempts of a launch. TORCHELASTIC_RESTART_COUNT is no substitute: it stays 0 on a host that
    only follows another host's restart.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # torchrun makes a folder of a random name for each launch, and passes on FOLDER/attempt_1/0/error.json.
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    attempt = error_file.parent.parent
    launch = str(attempt.parent) if attempt.name.startswith("attempt_") else f"process {os.getppid()}"
    return f"{os.environ['TORCHELASTIC_RUN_ID']} on {socket.gethostname()}: {launch}"


def hosts_of_ranks() -> list[str]:
    """Return the host of each rank, as the hostfile names it; empty if no `deepspeed` started this process."""
    for argument in _arguments(os.getppid()):
        if argument.startswith("--world_info="):
            slots: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(argument.partition("=")[2]))
            return [host for host, ids in slots.items() for _ in ids]
    return []


def is_deepspeed(arguments: list[str]) -> bool:
    """Tell whether a command line is the `deepspeed` command's, with or without its interpreter in front."""
    return any(Path(word).name in ("deepspeed", "ds", "deepspeed.pt") for word in arguments[:3])


def ancestors() -> Iterator[tuple[list[str], Path]]:
    """Yield (command line, working folder) of the processes above this one, up to the first that may not be read."""
    process = psutil.Process()
    with suppress(psutil.Error):
        while process := process.parent():
            yield process.cmdline(), Path(process.cwd())


def _arguments(pid: int) -> list[str]:
    """Return a process's command line; empty if it is gone, or another user's on a machine that hides those."""
    with suppress(psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


def _program(pid: int) -> str:
    return next(iter(_arguments(pid)), "")


def _parent(pid: int) -> int:
    """Return the pid of a process's parent; 0 if it is gone or hidden."""
    with suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return 0
