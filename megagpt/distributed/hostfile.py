"""Check hostfiles and .deepspeed_env, which deepspeed passes to ssh and to shells on other hosts."""

import os
import re
from pathlib import Path

from megagpt.distributed.launcher import ancestors, is_deepspeed
from megagpt.errors import UserError

# A host name without characters that ssh would read as an option or a shell as more than a name.
HOST_LINE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s+slots=(?P<slots>[1-9][0-9]{0,3})(\s*#.*)?")

ENV_LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_.,:/@%+=^~-]*")  # pasted into a remote shell's command line

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(_|=|$)")


def check_hostfile() -> None:
    """Check the hostfile and the environment file that the `deepspeed` above this process was given.

    Raises UserError if the hostfile does not exist (deepspeed only warns, and trains on one machine), or if either
    holds text that a shell would run, as far as this process can see the launcher.
    """
    for arguments, folder in ancestors():
        named = _named_hostfile(arguments)
        if named is not None and not (folder / named).is_file():
            raise UserError(
                f"--hostfile {named} does not exist, and deepspeed would train on this machine alone; "
                "launch/hostfile.example shows one"
            )
        if named is not None:
            check_hosts(folder / named)
    # With several hosts the launcher goes over ssh and starts its ranks in the folder that it was started in.
    if int(os.environ.get("CROSS_SIZE", "1")) > 1:
        check_environment(Path.cwd())


def check_hosts(hostfile: Path) -> dict[str, int]:
    """Read a hostfile: host -> slots. Raises UserError with the line that is not `NAME slots=N` with a plain name."""
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
    """Check the environment file that deepspeed, started in `folder`, would paste into shells on other hosts.

    Raises UserError for one in any folder but the home folder, and as `check_settings` does.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    in_home = home() / name
    if (folder / name).is_file() and folder.resolve() != home().resolve():
        raise UserError(
            f"{folder / name}: deepspeed pastes this file, since it is started here, into a shell on every host, and "
            f"others may have written it; move the lines that you need to {in_home}"
        )
    if in_home.is_file():
        check_settings(in_home)


def home() -> Path:
    """Return the home folder as torch and DeepSpeed find it: `~` itself if HOME is unset and the user has no entry.

    Path.home() raises RuntimeError there, as in a container that was started with a bare user id.
    """
    return Path(os.path.expanduser("~"))


def check_settings(file: Path) -> None:
    """Check that each line of a .deepspeed_env is a plain setting and no secret. Raises UserError with the line."""
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
    """Return the value of the launcher's own -H or --hostfile, which precede the script's name; None without."""
    if not is_deepspeed(arguments):
        return None
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.endswith(".py"):
            return None
        if option in ("-H", "--hostfile"):
            return value
        if option.startswith("--hostfile="):
            return option.removeprefix("--hostfile=")
    return None
