"""Ask an agent on every host, compare what the agents report, and measure one all-reduce between them."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

from megagpt.cli.doctor.agent import Finding, Report, Request
from megagpt.cli.doctor.launcher_environment import exported_variables, launcher_findings
from megagpt.config.run_file import load_run_config
from megagpt.distributed.hostfile import check_hosts
from megagpt.distributed.interfaces import GLOO
from megagpt.distributed.rendezvous import SAME_PROGRAMS, differences, mark_in
from megagpt.errors import UserError
from megagpt.terminal import typed

PORT = 29500  # deepspeed's default; --master_port sets another
PATIENCE = 60.0  # seconds that a host may take for all checks
CLOCKS = 5.0  # seconds by which clocks may differ
SLOW = 0.01  # GB/s: less than a 100 Mbit/s line
# Checks of what matters to a run that has a host to itself.
OF_ONE_HOST = ("ssh", "programs", "slots", "run file", "run", "data", "out_dir", "disk", "compile lock")
SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=8")


class Agent:
    """One host, and the agent process there, which answers each line with one line."""

    def __init__(self, name: str, over_ssh: bool) -> None:
        self.name, self.over_ssh = name, over_ssh
        self.report: Report | None = None
        command = [sys.executable, "-m", "megagpt", "doctor", "--probe"]
        there = shlex.join(["cd", os.getcwd()]) + " && exec " + shlex.join(["env", *exported_variables(), *command])
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
        """Return the agent's answer; raise UserError with the last line of its errors if there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            _, errors = self._process.communicate()
            lines = errors.strip().splitlines() or [f"no answer within {PATIENCE:.0f} s"]
            raise UserError(lines[-1]) from None

    def end(self) -> None:
        """Kill the agent, or the ssh that leads to it."""
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()


def examine(hostfile: Path | None, run_file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Check all hosts; return {"findings": [...], "hosts": {name: facts}, "all_reduce_gb_per_s": speed or None}.

    Raises UserError for a mistake in the hostfile.
    """
    slots = check_hosts(hostfile) if hostfile else {"localhost": 0}
    findings = list(launcher_findings(list(slots) if hostfile else []))
    mark, found = _left_mark(run_file, overrides) if run_file else (None, [])
    findings += found
    with _agents(slots, mark, over_ssh=hostfile is not None) as (agents, threads):
        requests = _requests(slots, run_file, overrides, mark)
        for found in threads.map(_examined, agents, requests):
            findings += found
        present = [agent for agent in agents if agent.report is not None]
        findings += _differences(present)
        speed = None
        # With one of these findings the all-reduce would fail or wait, and its error would say less.
        blocking = {finding.check for finding in findings} & {"programs", "interface", "port"}
        if len(present) == len(agents) > 1 and not blocking:
            speed, found = _all_reduce(present, threads)
            findings += found
    facts = {p.name: p.report.facts() for p in present if p.report}
    return {"findings": _merged(findings), "hosts": facts, "all_reduce_gb_per_s": speed}


def unready_for(run_file: Path, overrides: Sequence[str], slots: Mapping[str, int]) -> list[Finding]:
    """Find what would stop a run that has one of these hosts to itself, or make it another run there.

    Traffic between hosts does not matter to it, nor do their clocks or how alike their GPUs are.
    """
    mark, findings = _left_mark(run_file, overrides)
    requests = [replace(request, others=[], port=0) for request in _requests(slots, run_file, overrides, mark)]
    with _agents(slots, mark, over_ssh=True) as (agents, threads):
        for found in threads.map(_examined, agents, requests):
            findings += found
    findings += _differences(agents)
    return [finding for finding in _merged(findings) if finding.check in OF_ONE_HOST]


@contextmanager
def _agents(
    slots: Iterable[str], mark: Path | None, *, over_ssh: bool
) -> Iterator[tuple[list[Agent], ThreadPoolExecutor]]:
    """Start an agent on each host, and a thread for each; afterwards end them, and remove the mark."""
    agents = [Agent(name, over_ssh=over_ssh) for name in slots]
    try:
        with ThreadPoolExecutor(len(agents)) as threads:
            yield agents, threads
    finally:
        for agent in agents:
            agent.end()
        if mark:
            mark.unlink()


def _left_mark(run_file: Path, overrides: Sequence[str]) -> tuple[Path | None, list[Finding]]:
    """Leave a file next to out_dir, which the agents see if the hosts share that folder.

    What is wrong with the run file itself is a finding of the agents.
    """
    try:
        out_dir = load_run_config(run_file, overrides).megagpt.out_dir.absolute()
    except UserError:
        return None, []
    try:
        return mark_in(out_dir), []
    except UserError as error:
        return None, [Finding("out_dir", str(error))]


def _requests(
    slots: Mapping[str, int], run_file: Path | None, overrides: Sequence[str], mark: Path | None
) -> list[Request]:
    first = next(iter(slots))
    return [
        Request(
            name=name,
            others=[other for other in slots if other != name],
            slots=slots[name],
            port=PORT if name == first else 0,
            run_file=str(run_file or ""),
            overrides=list(overrides),
            mark=str(mark or ""),
        )
        for name in slots
    ]


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Merge findings that are the same on several hosts."""
    hosts: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts.setdefault(replace(finding, host=""), []).append(finding.host)
    return [replace(finding, host=", ".join(names)) for finding, names in hosts.items()]


def _examined(agent: Agent, request: Request) -> list[Finding]:
    """Return what is wrong with one host, and fill in its agent's report."""
    try:
        raw = agent.ask(json.dumps(vars(request)))
        # The host's clock is right if it lies between two readings of this one.
        before = time.time()
        there = agent.ask("clock")
        after = time.time()
    except UserError as error:
        if not agent.over_ssh:
            return [Finding("agent", f"{error}; run `{typed(sys.executable)} -m megagpt doctor --probe` to see why")]
        way = f"`ssh {agent.name} true` must work without a password, and this folder and .venv must exist there"
        return [Finding("ssh", f"{error}; {way}", agent.name)]
    findings = [Finding(**fields | {"host": agent.name}) for fields in raw.pop("findings")]
    agent.report = Report(**raw)
    if not before - CLOCKS < there < after + CLOCKS:
        text = f"its clock is {abs(there - after):,.0f} s {'ahead of' if there > after else 'behind'} this machine's"
        findings.append(Finding("clock", f"{text}; run an NTP service on all hosts", agent.name))
    return findings


def _differences(agents: Sequence[Agent]) -> Iterator[Finding]:
    """Find facts that are not equal on all hosts."""
    ways = {
        "programs": SAME_PROGRAMS,
        "machine": "install the same on all hosts",
        "network": "look for a link that is down; where hosts are unequal, the slowest sets the pace, which `megagpt "
        "plan` counts, given the cards and GB/s of each kind (--network 8x50,4x25)",
        "run": "let all hosts see one run file",
        "data": "let all hosts see the same dataset, or copies of it",
    }
    reports = [(agent.name, agent.report) for agent in agents if agent.report]
    for part, way in ways.items():
        # No host has such facts without a run file, or if none can read the datasets.
        if facts_of := [(name, facts) for name, report in reports if (facts := getattr(report, part))]:
            for text in differences(facts_of):
                yield Finding(part, f"{text}; {way}")


def _all_reduce(agents: Sequence[Agent], threads: ThreadPoolExecutor) -> tuple[float | None, list[Finding]]:
    """Measure an all-reduce between all hosts: (GB/s that each sends, or None if it failed; findings)."""
    first = agents[0].report
    assert first is not None
    lines = [f"reduce {rank} {len(agents)} {first.address} {PORT}" for rank in range(len(agents))]
    try:
        answers = list(threads.map(Agent.ask, agents, lines))
    except UserError as error:
        return None, [Finding("all-reduce", str(error))]
    if errors := [answer["error"] for answer in answers if answer["error"]]:
        return None, [Finding("all-reduce", errors[0])]
    speed = min(answer["gb_per_s"] for answer in answers)
    if speed > SLOW:
        return speed, []
    text = f"only {speed:.4f} GB/s from each host; look for a slow link, or for the wrong interface ({GLOO})"
    return speed, [Finding("all-reduce", text)]
