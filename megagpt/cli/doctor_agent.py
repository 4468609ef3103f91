"""What `megagpt doctor` runs on every host: a report of what is there, and then one all-reduce with the others.

It is spoken to by lines: a request (JSON) is answered by a report, "clock" by the time, "reduce ..." by a speed.
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
from megagpt.distributed.interfaces import gloo_address, is_loopback, remedy
from megagpt.distributed.rendezvous import PATIENCE, meet, programs
from megagpt.errors import UserError
from megagpt.model.flops import n_params
from megagpt.planner.estimate import GIB, vocabulary

MOMENTS_AND_MASTERS = 12  # bytes per parameter in a checkpoint, beside the weights themselves
STALE = 600.0  # seconds: no operator compiles for so long
ELEMENTS = 2**20  # of the all-reduce


@dataclass(frozen=True)
class Finding:
    """Something that will bite; the text ends with what mends it."""

    check: str
    text: str
    host: str = ""  # empty: of no host in particular

    def __str__(self) -> str:
        return f"{self.host + ': ' if self.host else ''}{self.check}: {self.text}"


@dataclass(frozen=True)
class Request:
    """What doctor asks of a host."""

    name: str  # of this host in the hostfile
    others: list[str]  # names of the others
    slots: int  # ranks here; 0: not said
    port: int  # where ranks would meet; 0: not on this host
    run_file: str
    overrides: list[str]
    mark: str  # a file left where out_dir is or will be; empty without a run file


@dataclass
class Report:
    """What a host says. Facts are compared over hosts."""

    programs: dict[str, str] = field(default_factory=programs)
    machine: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    address: str = ""  # the one that ranks on other hosts are given to meet at, if this host is the first
    findings: list[Finding] = field(default_factory=list)


def serve() -> int:
    """Answer on stdout what comes on stdin, until it ends."""
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
    said = Report(machine=_machine(), address=_first_address())
    said.findings += _about_network(request)
    said.findings += _about_compiling(said.machine)
    room, unit = (torch.cuda.device_count(), "GPUs") if torch.cuda.is_available() else (os.cpu_count() or 1, "cores")
    if request.slots > room:
        text = f"slots={request.slots} in the hostfile, but it has {room} {unit}; set slots={room}"
        said.findings.append(Finding("slots", text))
    if request.run_file:
        try:
            run = load_run_config(Path(request.run_file), request.overrides)
        except UserError as error:
            said.findings.append(Finding("run file", str(error)))
        else:
            said.run = leaves(run.as_json())
            said.findings += _about_data(run, said.data)
            said.findings += _about_disk(run, Path(request.mark))
    return said


def all_reduce(rank: str, n_ranks: str, address: str, port: str) -> dict[str, Any]:
    """The speed (GB/s sent by each rank) of a sum that is checked, or a complaint."""
    os.environ.update(RANK=rank, WORLD_SIZE=n_ranks, LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=port)
    os.environ[PATIENCE] = "12"
    try:
        device = meet()
    except UserError as error:
        return {"complaint": str(error)}
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
            return {"complaint": f"the sum over all hosts came out wrong on {socket.gethostname()}"}
    dist.destroy_process_group()
    return {"complaint": "", "gb_per_s": 2 * (n - 1) / n * ELEMENTS * 4 / fastest / 1e9}


def _machine() -> dict[str, str]:
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


def _about_network(request: Request) -> Iterator[Finding]:
    for host in request.others:
        try:
            address = socket.gethostbyname(host)
        except OSError as error:
            yield Finding("names", f"the name {host} leads nowhere ({error}); mend DNS, /etc/hosts or the hostfile")
        else:
            if is_loopback(address):
                yield Finding("names", f"the name {host} leads to {address}, this host itself; mend /etc/hosts")
    try:
        address = gloo_address()
    except UserError as error:
        yield Finding("interface", str(error))
    else:
        if request.others and is_loopback(address):
            way = remedy(request.others[0])
            yield Finding("interface", f"gloo would take {address}, which no other host reaches; {way}")
    if request.port:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store will: what has ended is free
                probe.bind(("", request.port))  # refused if anybody listens on any address; it does not listen itself
        except OSError:
            who = _listener(request.port)
            text = f"port {request.port}, where ranks would meet, is taken{who}; end it, or deepspeed --master_port N"
            yield Finding("port", text)


def _about_compiling(machine: dict[str, str]) -> Iterator[Finding]:
    if machine["compiler"] == "none":
        yield Finding("compiler", "no c++, by which blocks on CUDA and CPU offload are compiled; apt-get install g++")
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR", home() / ".cache" / "torch_extensions")
    for lock in Path(compiled).rglob("lock"):
        if (age := time.time() - lock.stat().st_mtime) > STALE:
            text = (
                f"{lock} is {age / 3600:.1f} h old: who compiled there is gone, and every start waits for it; rm {lock}"
            )
            yield Finding("compile lock", text)


def _about_data(run: RunConfig, fingerprints: dict[str, str]) -> Iterator[Finding]:
    """Fills in the fingerprints of what is there."""
    cfg = run.megagpt.data
    for path in dict.fromkeys([*(one.path for one in cfg.train), cfg.val]):
        try:
            fingerprints[f"{path} (fingerprint)"] = read_manifest(path).fingerprint
        except UserError as error:
            yield Finding("data", str(error))


def _about_disk(run: RunConfig, mark: Path) -> Iterator[Finding]:
    cfg = run.megagpt
    if not mark.exists():
        text = f"{cfg.out_dir} is not shared: what is written there elsewhere is not seen here"
        yield Finding("out_dir", f"{text}; set megagpt.out_dir to a folder of a file system that all hosts have")
        return
    count = cfg.keep.last + cfg.keep.best + 1  # and the one that is being written
    size = n_params(cfg.model, vocabulary(run)[0])
    needed = count * size * (MOMENTS_AND_MASTERS + (4 if run.deepspeed.dtype == "fp32" else 2))
    free = shutil.disk_usage(mark.parent).free
    if free < needed:
        text = f"{count} checkpoints of {size / 1e6:,.1f} million parameters need {needed / GIB:,.1f} GiB in "
        text += f"{cfg.out_dir}, where {free / GIB:,.1f} are free; make room, or lower megagpt.keep"
        yield Finding("disk", text)


def _first_address() -> str:
    """What deepspeed takes for MASTER_ADDR if this is the first host."""
    return (_first_line("hostname", "-I") or "127.0.0.1").split()[0]


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _listener(port: int) -> str:
    try:
        taken = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
        return f" by {psutil.Process(taken[0]).name()}, process {taken[0]}" if taken else ""
    except psutil.Error:
        return ""
