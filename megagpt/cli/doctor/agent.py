"""The agent that `megagpt doctor` starts on every host: it reports on the host, then joins in one all-reduce.

It reads lines from stdin and answers each with one line of JSON: a request (JSON) with a report, "clock" with the
time, and "reduce RANK N ADDRESS PORT" with a speed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.data.manifest import read_manifest
from megagpt.distributed.hostfile import home
from megagpt.distributed.interfaces import gloo_address, interface_advice, is_loopback
from megagpt.distributed.meeting import WAIT_VARIABLE
from megagpt.distributed.network_cards import network_cards
from megagpt.distributed.rendezvous import meet, programs
from megagpt.errors import UserError
from megagpt.model.flops import n_params
from megagpt.planner.estimate import GIB, vocabulary

# Bytes per parameter in a checkpoint besides the weights: Adam's moments and the fp32 master weights.
MOMENTS_AND_MASTERS = 12
# A lock older than this, in seconds, is left by a process that is gone: no operator compiles for so long.
STALE = 600.0
# Elements of the all-reduce.
ELEMENTS = 2**20


@dataclass(frozen=True)
class Finding:
    """Something that would stop or slow training; the text ends with a fix."""

    check: str
    text: str
    host: str = ""  # empty: not about one host

    def __str__(self) -> str:
        return f"{self.host + ': ' if self.host else ''}{self.check}: {self.text}"


@dataclass(frozen=True)
class Request:
    """The checks that doctor requests from the agent of a host."""

    name: str  # this host's name in the hostfile
    others: list[str]  # the names of the other hosts
    slots: int  # ranks here; 0: the hostfile does not tell
    port: int  # the rendezvous port; 0: it is on another host
    run_file: str
    overrides: list[str]
    mark: str  # a file that doctor left where out_dir is or will be; empty if it could not


@dataclass
class Report:
    """The facts about a host, which doctor compares over hosts, and what is wrong with it alone."""

    programs: dict[str, str] = field(default_factory=programs)
    machine: dict[str, str] = field(default_factory=dict)
    network: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)  # what may differ between hosts
    address: str = ""  # the rendezvous address if this host is the first
    findings: list[Finding] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """Return what was read, for people, in the order in which it is shown."""
        return {**self.programs, **self.machine, **self.network, **self.own, **self.data}


def serve() -> int:
    """Answer each line of stdin on stdout, until stdin ends."""
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "clock":
            answer: Any = time.time()
        elif word == "reduce":
            answer = all_reduce(*rest.split())
        else:
            answer = asdict(report(Request(**json.loads(line))))
        print(json.dumps(answer), flush=True)
    return 0


def report(request: Request) -> Report:
    """Check this host, and the data and disk of a run if the request names its run file."""
    cards = {"network cards": network_cards()}
    result = Report(machine=_machine(), network=cards, own=_own_facts(), address=_first_address())
    result.findings += _network_findings(request, result.own)
    result.findings += _compiler_findings(result.machine)
    room, unit = (torch.cuda.device_count(), "GPUs") if torch.cuda.is_available() else (os.cpu_count() or 1, "cores")
    if request.slots > room:
        text = f"slots={request.slots} in the hostfile, but it has {room} {unit}; set slots={room}"
        result.findings.append(Finding("slots", text))
    result.own["run file"] = request.run_file or "none given; `megagpt doctor RUN.json` checks its data and disk too"
    if request.run_file:
        try:
            run = load_run_config(Path(request.run_file), request.overrides)
        except UserError as error:
            result.findings.append(Finding("run file", str(error)))
        else:
            result.run = leaves(run.as_json())
            result.findings += _data_findings(run, result.data)
            if request.mark:
                result.findings += _disk_findings(run, Path(request.mark), result.own)
    return result


def all_reduce(rank: str, n_ranks: str, address: str, port: str) -> dict[str, Any]:
    """Sum a tensor over all hosts and check the sum; return {"gb_per_s": sent by each rank, "error": "" or why not}."""
    os.environ.update(RANK=rank, WORLD_SIZE=n_ranks, LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=port)
    os.environ[WAIT_VARIABLE] = "12"
    try:
        device = meet()
    except UserError as error:
        return {"error": str(error)}
    mine = torch.arange(ELEMENTS, device=device) % 97 + int(rank)
    n = int(n_ranks)
    expected = torch.arange(ELEMENTS, device=device) % 97 * n + n * (n - 1) // 2
    fastest = float("inf")
    for _ in range(3):
        summed = mine.float()
        began = time.monotonic()
        dist.all_reduce(summed)
        same = bool(torch.equal(summed, expected.float()))  # waits for the device
        fastest = min(fastest, time.monotonic() - began)
        if not same:
            return {"error": f"the sum over all hosts came out wrong on {socket.gethostname()}"}
    dist.destroy_process_group()
    # A ring sends 2 (n - 1) / n of the tensor's bytes from each rank.
    return {"error": "", "gb_per_s": 2 * (n - 1) / n * ELEMENTS * 4 / fastest / 1e9}


def _machine() -> dict[str, str]:
    """Return the versions and devices that should be equal on all hosts."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "CUDA": torch.version.cuda or "none",
        "driver": driver or "none",
        "NCCL": nccl,
        "GPUs": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none",
        "compiler": _first_line(os.environ.get("CXX", "c++"), "--version") or "none",
    }


def _own_facts() -> dict[str, str]:
    """Return the cores and memory of this host, by which hosts may differ."""
    memory = psutil.virtual_memory()
    return {
        "cores": str(os.cpu_count() or 1),
        "memory": f"{memory.available / GIB:,.1f} of {memory.total / GIB:,.1f} GiB are available",
    }


def _network_findings(request: Request, facts: dict[str, str]) -> Iterator[Finding]:
    """Check that other hosts' names resolve, that gloo picks an interface they reach, and that the port is free.

    Adds the address and the port to the facts.
    """
    for host in request.others:
        try:
            address = socket.gethostbyname(host)
        except OSError as error:
            yield Finding("names", f"the name {host} does not resolve ({error}); fix DNS, /etc/hosts or the hostfile")
        else:
            if is_loopback(address):
                yield Finding("names", f"the name {host} resolves to {address}, this host itself; fix /etc/hosts")
    try:
        address = gloo_address()
    except UserError as error:
        yield Finding("interface", str(error))
    else:
        facts["gloo's address"] = address
        if request.others and is_loopback(address):
            way = interface_advice(request.others[0])
            yield Finding("interface", f"gloo would take {address}, which no other host reaches; {way}")
    if request.port:
        facts[f"port {request.port}"] = "taken"
        try:
            with socket.socket() as attempt:
                # As torch's store sets it: a port whose connections are closing counts as free.
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Fails if any process listens on the port, on any address.
                attempt.bind(("", request.port))
                facts[f"port {request.port}"] = "free"
        except OSError:
            who = _listener(request.port)
            text = (
                f"port {request.port}, where ranks would meet, is taken{who}; end it, or use deepspeed --master_port N"
            )
            yield Finding("port", text)


def _compiler_findings(machine: dict[str, str]) -> Iterator[Finding]:
    """Check that there is a C++ compiler, and that no dead process holds the lock of an extension."""
    if machine["compiler"] == "none":
        yield Finding("compiler", "no c++, which compiles blocks for CUDA and CPU offload; apt-get install g++")
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR", home() / ".cache" / "torch_extensions")
    for lock in Path(compiled).rglob("lock"):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:  # released meanwhile
            continue
        if age > STALE:
            text = (
                f"{lock} is {age / 3600:.1f} h old: its process is gone, and every start would wait for it; rm {lock}"
            )
            yield Finding("compile lock", text)


def _data_findings(run: RunConfig, fingerprints: dict[str, str]) -> Iterator[Finding]:
    """Check that the datasets can be read, and add their fingerprints."""
    cfg = run.megagpt.data
    for path in dict.fromkeys(cfg.folders):
        try:
            fingerprints[f"{path} (fingerprint)"] = read_manifest(path).fingerprint
        except UserError as error:
            yield Finding("data", str(error))


def _disk_findings(run: RunConfig, mark: Path, facts: dict[str, str]) -> Iterator[Finding]:
    """Check that out_dir is shared with the host that left the mark, and has room for the checkpoints that are kept.

    Adds that room to the facts.
    """
    cfg = run.megagpt
    if not mark.exists():
        text = f"{cfg.out_dir} is not shared: files that other hosts write there are not seen here"
        yield Finding("out_dir", f"{text}; set megagpt.out_dir to a folder of a file system that all hosts share")
        return
    # One more is being written.
    count = cfg.keep.last + cfg.keep.best + 1
    size = n_params(cfg.model, vocabulary(run)[0])
    needed = count * size * (MOMENTS_AND_MASTERS + (4 if run.deepspeed.dtype == "fp32" else 2))
    free = shutil.disk_usage(mark.parent).free
    facts[f"disk of {cfg.out_dir}"] = (
        f"{free / GIB:,.1f} GiB are free; {count} checkpoints need {needed / GIB:,.1f} GiB"
    )
    if free < needed:
        text = f"{count} checkpoints of {size / 1e6:,.1f} million parameters need {needed / GIB:,.1f} GiB in "
        text += f"{cfg.out_dir}, where {free / GIB:,.1f} GiB are free; make room, or lower megagpt.keep"
        yield Finding("disk", text)


def _first_address() -> str:
    """Return the address that deepspeed would choose as MASTER_ADDR if this is the first host."""
    return (_first_line("hostname", "-I") or "127.0.0.1").split()[0]


def _first_line(*command: str) -> str:
    """Return the first line that a command prints; "" if it fails or takes more than 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _listener(port: int) -> str:
    """Name the process that uses a port, for the end of a phrase; "" if this user may not see it."""
    try:
        taken = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
        return f" by {psutil.Process(taken[0]).name()}, process {taken[0]}" if taken else ""
    except psutil.Error:
        return ""
