"""`megagpt doctor`: is every host of a hostfile ready to train, and if not, what mends it. Starts no training."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

from megagpt.atomic_files import write_atomically
from megagpt.cli.doctor_agent import Finding, Report, Request, serve
from megagpt.config.run_file import load_run_config
from megagpt.distributed.hostfile import ENV_LINE, SECRET_NAME, check_environment, check_hosts, home
from megagpt.distributed.interfaces import GLOO, interface_to
from megagpt.distributed.rendezvous import SAME_PROGRAMS, differences, mark_in
from megagpt.errors import UserError

PORT = 29500  # deepspeed's own, unless --master_port says otherwise
PATIENCE = 60.0  # seconds that a host may take for everything
CLOCKS = 5.0  # seconds by which they may differ
SLOW = 0.01  # GB/s: less than a 100 Mbit/s line
TRAVELS = ("GLOO_", "NCCL_", "OMP_", "TORCH_", "MEGAGPT_")  # names of variables that all ranks should have alike
SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=8")


class Probe:
    """One host, and a program there that answers line by line."""

    def __init__(self, name: str, over_ssh: bool) -> None:
        self.name = name
        self.report: Report | None = None
        command = [sys.executable, "-m", "megagpt", "doctor", "--probe"]
        there = shlex.join(["cd", os.getcwd()]) + " && exec " + shlex.join(["env", *_exported(), *command])
        self._process = subprocess.Popen(
            [*SSH, name, there] if over_ssh else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._timer = Timer(PATIENCE, self._process.kill)
        self._timer.start()

    def ask(self, line: str) -> Any:
        """The answer; raises UserError with what the host said last if none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            _, complaints = self._process.communicate()
            said = complaints.strip().splitlines() or [f"no answer within {PATIENCE:.0f} s"]
            raise UserError(said[-1]) from None

    def end(self) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()


def examine(hostfile: Path | None, run_file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that is known about the hosts: {"findings": [...], "hosts": {name: facts}, "all_reduce_gb_per_s"}.

    Raises UserError for a hostfile or a run file that is wrong by itself.
    """
    slots = check_hosts(hostfile) if hostfile else {"localhost": 0}
    findings = list(_about_launching(list(slots) if hostfile else []))
    mark = mark_in(load_run_config(run_file, overrides).megagpt.out_dir.absolute()) if run_file else None
    probes = [Probe(name, over_ssh=hostfile is not None) for name in slots]
    try:
        with ThreadPoolExecutor(len(probes)) as together:
            requests = [
                Request(
                    name=name,
                    others=[other for other in slots if other != name],
                    slots=slots[name],
                    port=PORT if name == next(iter(slots)) else 0,
                    run_file=str(run_file or ""),
                    overrides=list(overrides),
                    mark=str(mark or ""),
                )
                for name in slots
            ]
            for found in together.map(_examined, probes, requests):
                findings += found
            present = [probe for probe in probes if probe.report is not None]
            findings += _differences(present)
            speed = None
            in_the_way = {finding.check for finding in findings} & {"programs", "interface", "port"}
            if len(present) == len(probes) > 1 and not in_the_way:
                speed, found = _all_reduce(present, together)
                findings += found
    finally:
        for probe in probes:
            probe.end()
        if mark:
            mark.unlink()
    facts = {p.name: {**p.report.programs, **p.report.machine} for p in present if p.report}
    return {"findings": _merged(findings), "hosts": facts, "all_reduce_gb_per_s": speed}


def write_environment(hostfile: Path | None) -> str:
    """Put what must travel to the other hosts into ~/.deepspeed_env, beside what is there; returns what it says now."""
    file, settings = _file(), _settings()
    for host in list(check_hosts(hostfile))[1:2] if hostfile else []:
        if name := interface_to(host):
            settings |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), name)
    settings |= _to_travel()
    text = "".join(f"{name}={value}\n" for name, value in settings.items())
    write_atomically(file, text.encode())
    return f"{file}:\n{text}"


def as_text(found: Mapping[str, Any]) -> str:
    lines = [str(finding) for finding in found["findings"]]
    speed = found["all_reduce_gb_per_s"]
    hosts = ", ".join(found["hosts"]) or "no host answered"
    lines.append(
        f"{hosts}: {len(lines) or 'nothing'} to mend"
        + ("" if speed is None else f"; an all-reduce sends {speed:.2f} GB/s from each")
    )
    return "\n".join(lines)


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """What is the same on several hosts once."""
    hosts: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts.setdefault(replace(finding, host=""), []).append(finding.host)
    return [replace(finding, host=", ".join(names)) for finding, names in hosts.items()]


def _examined(probe: Probe, request: Request) -> list[Finding]:
    """What is wrong with this host; fills in the probe's report."""
    try:
        raw = probe.ask(json.dumps(vars(request)))
        before = time.time()
        there = probe.ask("clock")
        after = time.time()
    except UserError as error:
        way = f"`ssh {probe.name} true` must work without a password, and this folder and .venv must be there"
        return [Finding("ssh", f"{error}; {way}", probe.name)]
    findings = [Finding(**fields | {"host": probe.name}) for fields in raw.pop("findings")]
    probe.report = Report(**raw)
    if not before - CLOCKS < there < after + CLOCKS:
        text = f"its clock is {abs(there - after):,.0f} s {'ahead of' if there > after else 'behind'} this machine's"
        findings.append(Finding("clock", f"{text}; run an NTP service on all hosts", probe.name))
    return findings


def _about_launching(hosts: list[str]) -> Iterator[Finding]:
    """What is seen on this machine alone."""
    if not hosts:
        return
    try:
        check_environment(Path.cwd())
    except UserError as error:
        yield Finding(".deepspeed_env", str(error))
    there = _settings()
    if missing := [f"{name}={value}" for name, value in _to_travel().items() if there.get(name) != value]:
        text = f"{', '.join(missing)} set here alone: deepspeed does not forward it; put it into ~/.deepspeed_env, as "
        yield Finding("environment", f"{text}megagpt doctor --hostfile HOSTS --write-env does")
    if shutil.which("pdsh") is None:
        yield Finding("pdsh", "not found here, and deepspeed starts its ranks by it; apt-get install pdsh")
    elif "ssh" not in subprocess.run(["pdsh", "-V"], capture_output=True, text=True, check=False).stdout:
        yield Finding("pdsh", "it was built without ssh, by which deepspeed uses it; install pdsh's module for ssh")
    for host in hosts:
        config = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=False).stdout.splitlines()
        if "serveraliveinterval 0" in config:
            text = "deepspeed would wait for hours for a host that lost its power; write `ServerAliveInterval 15` into "
            yield Finding("ssh", f"{text}~/.ssh/config", host)


def _differences(probes: Sequence[Probe]) -> Iterator[Finding]:
    ways = {
        "programs": SAME_PROGRAMS,
        "machine": "install the same on all hosts",
        "run": "let all hosts see one run file",
        "data": "let all hosts see the same dataset, or copies of it",
    }
    reports = [(probe.name, probe.report) for probe in probes if probe.report]
    for part, way in ways.items():
        said = [(name, getattr(report, part)) for name, report in reports]
        for text in differences([(name, facts) for name, facts in said if facts]):
            yield Finding(part, f"{text}; {way}")


def _all_reduce(probes: Sequence[Probe], together: ThreadPoolExecutor) -> tuple[float | None, list[Finding]]:
    first = probes[0].report
    assert first is not None
    lines = [f"reduce {rank} {len(probes)} {first.address} {PORT}" for rank in range(len(probes))]
    try:
        answers = list(together.map(Probe.ask, probes, lines))
    except UserError as error:
        return None, [Finding("all-reduce", str(error))]
    if complaints := [answer["complaint"] for answer in answers if answer["complaint"]]:
        return None, [Finding("all-reduce", complaints[0])]
    speed = min(answer["gb_per_s"] for answer in answers)
    if speed > SLOW:
        return speed, []
    text = f"only {speed:.4f} GB/s from each host; look for a slow link, or for the wrong interface ({GLOO})"
    return speed, [Finding("all-reduce", text)]


def _to_travel() -> dict[str, str]:
    """This shell's variables that ranks on all hosts should have."""
    found = {name: value for name, value in os.environ.items() if name.startswith(TRAVELS)}
    return {n: v for n, v in found.items() if ENV_LINE.fullmatch(f"{n}={v}") and not SECRET_NAME.search(n)}


def _file() -> Path:
    return home() / os.environ.get("DS_ENV_FILE", ".deepspeed_env")


def _settings() -> dict[str, str]:
    """What ~/.deepspeed_env sets on the other hosts."""
    lines = _file().read_text(encoding="utf-8", errors="replace").splitlines() if _file().is_file() else []
    return dict(line.split("=", 1) for line in lines if ENV_LINE.fullmatch(line))


def _exported() -> list[str]:
    """NAME=VALUE of what deepspeed would set on the other hosts."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    ours["PYTHONPATH"] = ":".join(filter(None, [os.getcwd(), ours.get("PYTHONPATH")]))
    return [f"{name}={value}" for name, value in (ours | _settings()).items()]


def run(args: argparse.Namespace) -> int:
    if args.probe:
        return serve()
    if args.write_env:
        print(write_environment(args.hostfile), file=sys.stderr)
    found = examine(args.hostfile, args.run_file, args.overrides)
    print(json.dumps(found, default=vars) if args.json else as_text(found))
    return 2 if found["findings"] else 0


def run_check_hosts(args: argparse.Namespace) -> int:
    check_hosts(args.hostfile)
    check_environment(Path.cwd())
    return 0
