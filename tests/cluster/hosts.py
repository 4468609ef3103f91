"""Real hosts inside one machine: each a network, a name, mounts and processes of its own, with sshd and pdsh.

    with Cluster(folder, 2) as cluster:
        cluster.start(sshd)
        cluster["h1"].run("ssh", "h2", "hostname")

A host is a process that has Linux namespaces to itself. Whoever runs in them ends with it, so nothing is left of a host
that is switched off, of a test that failed, or of pytest itself when it is killed; and as namespaces have no names,
any number of labs stand side by side. Folders are shared by all hosts unless `bind` or `tmpfs` covers them on one.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "pdsh", "sshd", "ssh-keygen", "faketime")
PACKAGES = "iproute2 pdsh openssh-server faketime munge slurm-wlm chromium chromium-driver"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
TIMEOUT = 120.0
Variables = Mapping[str, str] | None


def missing(*more: str) -> str:
    """Why a lab cannot be raised on this machine, or an empty string."""
    if os.geteuid() != 0:
        return "raising hosts needs root"
    absent = [name for name in (*NEEDED, *more) if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install {PACKAGES}"
    tried = subprocess.run(["unshare", "-n", "-m", "-u", "-p", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Program:
    """A running command whose output can be waited for."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: list[str] = []
        self._news, self._closed = threading.Condition(), False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def until(self, text: str, timeout: float = TIMEOUT) -> None:
        """Wait for a line with this text."""
        with self._news:
            self._news.wait_for(lambda: self._closed or any(text in line for line in self._lines), timeout)
        assert any(text in line for line in self._lines), f"{text!r} did not come:\n{self.output[-6000:]}"

    def end(self, timeout: float = TIMEOUT) -> int:
        """The exit code, once all output is read."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:.0f} s:\n{self.output[-6000:]}") from None
        self._reader.join(10)
        return code


class Host:
    """One machine of a cluster, switched on."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.number, self.name, self.address = number, f"h{number}", f"10.99.0.{number}"
        self.cluster = cluster
        clock = cluster.clocks.get(self.name)
        self.clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": clock} if clock else {}
        self.environment = cluster.environment | self.clock
        # it ends with us, and everything in its namespaces with it; --kill-child passes that on
        alone = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        init = [sys.executable, "-ISu", str(Path(__file__).with_name("init.py"))]
        with (cluster.folder / f"{self.name}.log").open("a") as log:
            self._above = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *alone, *init], stderr=log)
        self.pid = _only_child(self._above.pid, "init.py")
        self._daemons = {self.pid}
        self.run("hostname", self.name)
        cluster.plug_in(self)
        self.bind(cluster.folder / "hosts", Path("/etc/hosts"))
        self.bind(cluster.folder / "ssh_config", Path("/etc/ssh/ssh_config"))

    def command(self, *arguments: str | Path, cwd: Path | None = None, env: Variables = None) -> list[str]:
        """That runs these arguments on this host."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "env", "-C", str(cwd or self.cluster.folder)]
        return [*enter, *(f"{name}={value}" for name, value in (env or {}).items()), *map(str, arguments)]

    def run(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Variables = None,
        check: bool = True,
        timeout: float = TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments, cwd=cwd, env=env),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{self.name}: {arguments}:\n{done.stdout}{done.stderr}"
        return done

    def start(self, *arguments: str | Path, cwd: Path | None = None, env: Variables = None) -> Program:
        return Program(self.command(*arguments, cwd=cwd, env=env), self.environment)

    def daemon(self, *arguments: str | Path) -> None:
        """Run what puts itself into the background; it does not count among `processes`."""
        before = {process.pid for process in self._all()}
        subprocess.run(self.command(*arguments), env=self.cluster.environment, check=True, timeout=TIMEOUT)
        self._daemons |= {process.pid for process in self._all()} - before

    def count_all_as_daemons(self) -> None:
        """Count nothing that runs here now among `processes`: some daemons start others later."""
        self._daemons |= {process.pid for process in self._all()}

    def bind(self, source: Path, target: Path) -> None:
        """On this host alone `target` is `source`; both exist."""
        self.run("mount", "--bind", source, target)

    def tmpfs(self, target: Path, size: str = "64m") -> None:
        """On this host alone `target` is an empty disk of that size."""
        self.run("mount", "-t", "tmpfs", "-o", f"size={size}", "lab", target)

    def cable(self, state: str) -> None:
        """Plug the network "up" or "down"."""
        self.run("ip", "link", "set", "eth0", state)

    def processes(self, part: str = "") -> list[psutil.Process]:
        """What runs here beside the daemons; with `part`, what has it in its command line."""
        found = [process for process in self._all() if process.pid not in self._daemons]
        return [process for process in found if part in " ".join(_command_line(process))]

    def rank(self) -> psutil.Process:
        """The one rank of training that runs here."""
        found = self.processes("--local_rank=0")
        [rank] = [process for process in found if "deepspeed.launcher.launch" not in _command_line(process)]
        return rank

    def wait_for_rest(self, timeout: float = 60.0) -> list[psutil.Process]:
        """What still runs after so long."""
        psutil.wait_procs(self.processes(), timeout)
        return self.processes()

    @property
    def is_on(self) -> bool:
        return self._above.poll() is None

    def power_off(self) -> None:
        """At once, with no word to anybody: no socket is closed in an orderly way."""
        self.cable("down")
        self.end()

    def end(self) -> None:
        """The kernel ends all that runs in here first."""
        if self.is_on:
            os.kill(self.pid, signal.SIGKILL)
            self._above.wait(30)

    def _all(self) -> list[psutil.Process]:
        here = _namespace(self.pid)
        return [process for process in psutil.process_iter() if _namespace(process.pid) == here]


class Cluster:
    """Hosts h1, h2, ... on one switch, each of which can be switched off and on again."""

    def __init__(self, folder: Path, n_hosts: int) -> None:
        self.folder = folder
        self._numbers = range(1, n_hosts + 1)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"
        dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        own = {key: value for key, value in os.environ.items() if key not in dropped and not key.startswith("SLURM")}
        self.environment = own | {"PATH": path, "HOME": str(folder / "home"), "PDSH_RCMD_TYPE": "ssh"}
        self.services: list[Callable[[Host], None]] = []
        self.clocks: dict[str, str] = {}  # host -> how far its clock is off from the next time it is switched on
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "home").mkdir()
        lines = [f"10.99.0.{n} h{n}" for n in self._numbers]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._make_keys()
        self._switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
        try:
            _wait_until(lambda: _command_line(psutil.Process(self._switch.pid))[:1] == ["sleep"])
            self._on_switch("add", "br0", "type", "bridge")
            self._on_switch("set", "br0", "up")
            for number in self._numbers:
                self.power_on(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self:
            host.end()
        self._switch.kill()
        self._switch.wait(30)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def power_on(self, number: int) -> Host:
        host = self.hosts[f"h{number}"] = Host(self, number)
        for service in self.services:
            service(host)
        return host

    def start(self, service: Callable[[Host], None]) -> None:
        """On every host; from now on whenever one is switched on."""
        self.services.append(service)
        for host in self:
            service(host)

    def plug_in(self, host: Host) -> None:
        end = f"to_{host.name}"
        subprocess.run(self._inside("link", "del", end), capture_output=True, check=False)  # of its life before
        card = ["name", "eth0", "address", f"02:00:00:00:00:{host.number:02x}"]  # the same after a restart
        self._on_switch("add", end, "type", "veth", "peer", *card, "netns", str(host.pid))
        self._on_switch("set", end, "master", "br0", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "link", "set", "eth0", "up")

    def hostfile(self, *lines: str) -> Path:
        """A hostfile of one slot on each host, or of these lines."""
        file = self.folder / "hosts.txt"
        file.write_text("".join(f"{line}\n" for line in lines or [f"{host.name} slots=1" for host in self]))
        return file

    def rest(self, timeout: float = 60.0) -> dict[str, list[str]]:
        """Host -> command lines of what still runs there after so long; empty if nothing does."""
        left = {
            host.name: [" ".join(_command_line(p)) for p in host.wait_for_rest(timeout)] for host in self if host.is_on
        }
        return {name: commands for name, commands in left.items() if commands}

    def _inside(self, *arguments: str) -> list[str]:
        return ["nsenter", "-t", str(self._switch.pid), "-n", "ip", *arguments]

    def _on_switch(self, *arguments: str) -> None:
        subprocess.run(self._inside("link", *arguments), check=True)

    def _make_keys(self) -> None:
        for name in ("host_key", "user_key"):
            key = str(self.folder / name)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key], check=True)
        public = (self.folder / "host_key.pub").read_text()
        names = ",".join(f"h{n},10.99.0.{n}" for n in self._numbers)
        (self.folder / "known_hosts").write_text(f"{names} {public}")
        config = {"IdentityFile": "user_key", "UserKnownHostsFile": "known_hosts"}
        lines = [f"{option} {self.folder / name}" for option, name in config.items()]
        (self.folder / "ssh_config").write_text(
            "\n".join(["Host *", *lines, "IdentitiesOnly yes", "ServerAliveInterval 3", ""])
        )


def sshd(host: Host) -> None:
    folder = host.cluster.folder
    options = {
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "ListenAddress": host.address,
        "PidFile": folder / f"sshd.{host.name}.pid",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "MaxStartups": "100",
    }
    if host.clock:
        options["SetEnv"] = " ".join(f"{name}={value}" for name, value in host.clock.items())
    host.run("mkdir", "-p", "/run/sshd")
    host.daemon("/usr/sbin/sshd", "-f", "/dev/null", *(f"-o{name}={value}" for name, value in options.items()))


def _only_child(pid: int, part: str) -> int:
    found: list[int] = []

    def look() -> bool:
        found[:] = [child.pid for child in psutil.Process(pid).children() if part in " ".join(_command_line(child))]
        return bool(found)

    _wait_until(look)
    return found[0]


def _wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "a namespace did not come up"
        time.sleep(0.01)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
