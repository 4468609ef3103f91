"""What the launcher above this process was told, where it keeps a mistake to itself."""

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from megagpt.errors import UserError

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL: deepspeed's, torchrun's, and Slurm's if nobody changed KillWait
LAUNCHERS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")  # deepspeed, torchrun and srun each set one
HOST_LINE = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s+slots=(?P<slots>[1-9][0-9]{0,3})(\s*#.*)?"
)  # no option, no shell
ENV_LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_.,:/@%+=^~-]*")  # pasted into a remote shell's command line
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(_|=|$)")


def watch() -> Callable[[], bool]:
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
    if not _is_deepspeed(_arguments(above[-1])):  # but a shell or ssh's daemon, which has a process for each connection
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


def check_hostfile() -> None:
    """`deepspeed --hostfile X` trains on one machine, with a warning, if X does not exist: raises UserError instead.

    Also for what it was told that a shell would run, as far as this process can see it.
    """
    for arguments, folder in _ancestors():
        named = _named_hostfile(arguments)
        if named is not None and not (folder / named).is_file():
            raise UserError(
                f"--hostfile {named} does not exist, and deepspeed would train on this machine alone; "
                "launch/hostfile.example shows one"
            )
        if named is not None:
            check_hosts(folder / named)
    if int(os.environ.get("CROSS_SIZE", "1")) > 1:  # over ssh: the folder is the same on all hosts
        check_environment(Path.cwd())


def check_hosts(hostfile: Path) -> dict[str, int]:
    """Host -> slots. Refuses names that ssh or a shell would read as more than a name: UserError with the line."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {hostfile} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for n, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name = line.split()[0]
        found = HOST_LINE.fullmatch(line)
        if not found or name in slots:
            why = "names a host again" if name in slots else "is not `NAME slots=N`, NAME of letters, digits, . _ and -"
            raise UserError(f"{hostfile}, line {n}: {line!r} {why}; launch/hostfile.example shows the form")
        slots[name] = int(found["slots"])
    if not slots:
        raise UserError(f"the hostfile {hostfile} names no host; launch/hostfile.example shows the form")
    return slots


def check_environment(folder: Path) -> None:
    """Refuse what deepspeed, started in `folder`, would paste into the other hosts' shells. Raises UserError."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    in_home = home() / name
    if (folder / name).is_file() and folder.resolve() != home().resolve():
        raise UserError(
            f"{folder / name}: deepspeed pastes what lies in the folder it is started in into a shell on every host, "
            f"and a folder may be anybody's; move what you need of it to {in_home}"
        )
    if in_home.is_file():
        check_settings(in_home)


def home() -> Path:
    """Return the home folder as torch and DeepSpeed find it: `~` itself if HOME is unset and the user has no entry.

    Path.home() raises RuntimeError there, as in a container that was started with a bare user id.
    """
    return Path(os.path.expanduser("~"))


def check_settings(file: Path) -> None:
    """Refuse lines of a .deepspeed_env that are more than a plain setting. Raises UserError with the line."""
    for n, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        key = line.partition("=")[0]
        if not ENV_LINE.fullmatch(line):
            raise UserError(
                f"{file}, line {n}, {key!r}: deepspeed pastes it into a shell on every host; write NAME=VALUE, "
                "VALUE without blanks, quotes or a shell's signs"
            )
        if SECRET_NAME.search(key):
            raise UserError(f"{file}, line {n}: deepspeed prints {key} in its log; set it on each host instead")


def _named_hostfile(arguments: list[str]) -> str | None:
    """The value of the launcher's own -H or --hostfile, which stand before the script's name."""
    if not _is_deepspeed(arguments):
        return None
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.endswith(".py"):
            return None
        if option in ("-H", "--hostfile"):
            return value
        if option.startswith("--hostfile="):
            return option.removeprefix("--hostfile=")
    return None


def _is_deepspeed(arguments: list[str]) -> bool:
    return any(Path(part).name in ("deepspeed", "ds", "deepspeed.pt") for part in arguments[:3])


def _ancestors() -> Iterator[tuple[list[str], Path]]:
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
