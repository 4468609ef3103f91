"""What the launcher above this process was told, where it keeps a mistake to itself."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megagpt.errors import UserError

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL: deepspeed's, torchrun's, and Slurm's if nobody changed KillWait
LAUNCHERS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")  # deepspeed, torchrun and srun each set one
HOST_LINE = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s+slots=[1-9][0-9]{0,3}(\s*#.*)?"
)  # no option, no shell
ENV_LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_.,:/@%+=^~-]*")  # pasted into a remote shell's command line
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(_|=|$)")


def watch() -> Callable[[], bool]:
    """A function that says whether the launcher above this rank is alive; always, if a person started this process.

    A person's process may outlive its shell; a launcher's ranks must not outlive the launcher. `deepspeed` is two
    processes, of which the lower survives the upper, so both are watched.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return lambda: True
    parent = os.getppid()
    two = any("deepspeed.launcher.launch" in part for part in _arguments(parent))
    above = _parent(parent) if two else 0
    return lambda: os.getppid() == parent and (not two or _parent(parent) == above)


def grace_warning(save_seconds: float) -> str:
    """What a signal to the launcher will cost, if a save takes longer than launchers wait; else an empty string."""
    if save_seconds <= GRACE_SECONDS or not any(name in os.environ for name in LAUNCHERS):
        return ""
    return (
        f"a save takes {save_seconds:.0f} s, and a launcher that is told to stop kills its ranks after "
        f"{GRACE_SECONDS:.0f} s: the run would fall back to the step saved before. Stop it by "
        "megagpt.time_limit_minutes, by Slurm's --signal=USR1@SECONDS or by SIGUSR1 to a rank, or lower "
        "megagpt.every.save"
    )


def check_hostfile() -> None:
    """`deepspeed --hostfile X` trains on one machine, with a warning, if X does not exist: raises UserError instead."""
    for arguments, folder in _ancestors():
        named = _named_hostfile(arguments)
        if named is not None and not (folder / named).is_file():
            raise UserError(
                f"--hostfile {named} does not exist, and deepspeed would train on this machine alone; "
                "launch/hostfile.example shows one"
            )
        if named is not None:
            check_hosts(folder / named)
            check_environment(folder)


def check_hosts(hostfile: Path) -> None:
    """Refuse names that ssh or a shell would read as more than a name. Raises UserError with the line."""
    try:
        lines = hostfile.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {hostfile} cannot be read: {error}") from error
    hosts: set[str] = set()
    for n, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name = line.split()[0]
        if not HOST_LINE.fullmatch(line) or name in hosts:
            why = "names a host again" if name in hosts else "is not `NAME slots=N`, NAME of letters, digits, . _ and -"
            raise UserError(f"{hostfile}, line {n}: {line!r} {why}; launch/hostfile.example shows the form")
        hosts.add(name)


def check_environment(folder: Path) -> None:
    """Refuse what deepspeed would paste into the other hosts' shells from a .deepspeed_env. Raises UserError."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, folder / name):
        for n, line in enumerate(file.read_text(errors="replace").splitlines() if file.is_file() else (), start=1):
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
    if not any(Path(part).name in ("deepspeed", "ds", "deepspeed.pt") for part in arguments[:3]):
        return None
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.endswith(".py"):
            return None
        if option in ("-H", "--hostfile"):
            return value
        if option.startswith("--hostfile="):
            return option.removeprefix("--hostfile=")
    return None


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


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
