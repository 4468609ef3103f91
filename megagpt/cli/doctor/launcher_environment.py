"""Check what `deepspeed` needs on this machine, and write what it sets on the other hosts (~/.deepspeed_env)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megagpt.atomic_files import write_atomically
from megagpt.cli.doctor.agent import Finding
from megagpt.distributed.hostfile import ENV_LINE, SECRET_NAME, check_environment, check_hosts, home
from megagpt.distributed.interfaces import interface_to
from megagpt.errors import UserError

# Prefixes of environment variables that should be equal on all ranks.
FORWARDED = ("GLOO_", "NCCL_", "OMP_", "TORCH_", "MEGAGPT_")


def write_environment(hostfile: Path | None) -> str:
    """Add the variables that the other hosts need to ~/.deepspeed_env, and return its name and new content.

    They are this shell's variables of FORWARDED, and the network interface by which the second host is reached.
    """
    file, settings = _environment_file(), _settings()
    for host in list(check_hosts(hostfile))[1:2] if hostfile else []:
        if name := interface_to(host):
            settings |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), name)
    settings |= _to_forward()
    text = "".join(f"{name}={value}\n" for name, value in settings.items())
    write_atomically(file, text.encode())
    return f"{file}:\n{text}"


def launcher_findings(hosts: list[str]) -> Iterator[Finding]:
    """Check what `deepspeed` needs on this machine: its environment file, pdsh and ssh."""
    if not hosts:
        return
    try:
        check_environment(Path.cwd())
    except UserError as error:
        yield Finding(".deepspeed_env", str(error))
    there = _settings()
    if missing := [f"{name}={value}" for name, value in _to_forward().items() if there.get(name) != value]:
        text = f"{', '.join(missing)} set only here: deepspeed does not forward it; put it into ~/.deepspeed_env, as "
        yield Finding("environment", f"{text}megagpt doctor --hostfile HOSTS --write-env does")
    if shutil.which("pdsh") is None:
        yield Finding("pdsh", "not found here, and deepspeed needs it to start ranks; apt-get install pdsh")
    elif "ssh" not in subprocess.run(["pdsh", "-V"], capture_output=True, text=True, check=False).stdout:
        yield Finding("pdsh", "it was built without ssh, which deepspeed uses; install pdsh's module for ssh")
    for host in hosts:
        config = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=False).stdout.splitlines()
        if "serveraliveinterval 0" in config:
            text = "deepspeed would wait for hours for a host that lost power; write `ServerAliveInterval 15` into "
            yield Finding("ssh", f"{text}~/.ssh/config", host)


def _to_forward() -> dict[str, str]:
    """Return this shell's variables that ranks on all hosts should have, without those that look like secrets."""
    found = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    return {n: v for n, v in found.items() if ENV_LINE.fullmatch(f"{n}={v}") and not SECRET_NAME.search(n)}


def _environment_file() -> Path:
    return home() / os.environ.get("DS_ENV_FILE", ".deepspeed_env")


def _settings() -> dict[str, str]:
    """Return the variables that ~/.deepspeed_env sets on the other hosts."""
    file = _environment_file()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return dict(line.split("=", 1) for line in lines if ENV_LINE.fullmatch(line))


def exported_variables() -> list[str]:
    """Return the variables that deepspeed would set on the other hosts, as NAME=VALUE."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    ours["PYTHONPATH"] = ":".join(filter(None, [os.getcwd(), ours.get("PYTHONPATH")]))
    return [f"{name}={value}" for name, value in (ours | _settings()).items()]
