"""Group G: a rank on each of two hosts (tests/cluster/hosts.py), and the network between them goes wrong. As root.

The rank that is struck waits, in the middle of a step or of a save, until the network is as it is to be; so the fault
meets the run where it should, and the rest of the run is left to the ranks.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from judge import Case, Outcome, last_lines, started_again
from lab import Ended
from numerics import in_forward
from strike import InSave
from support import ROOT
from systems import STEPS, Bare, Megagpt, System

from megagpt.distributed import collectives, process_group
from megagpt.engine.build import Engine

sys.path.insert(0, str(ROOT / "tests" / "cluster"))
from hosts import Cluster, missing

BEGIN, PORT = 4, "24500"
PATIENCE = 60.0  # seconds that ranks have to end by themselves
SILENCE, PAUSE = 8, 4.0  # seconds: until a watchdog ends its rank; without a network, when that is not for good
TIMEOUT = timedelta(seconds=15)  # of collectives in a save, in the place of half an hour


@dataclass(frozen=True)
class Fault:
    act: Callable[[Cluster], None]
    where: str = "a step"  # or a file of a save, before which rank 0 waits
    ends: bool = True  # the run; else it goes on as if nothing had been


def torn(cluster: Cluster) -> None:
    cluster["h2"].cable("down")


def torn_for_a_while(cluster: Cluster) -> None:
    cluster["h2"].cable("down")
    threading.Timer(PAUSE, cluster["h2"].cable, ["up"]).start()


def narrow(cluster: Cluster) -> None:
    """Two Mbit/s, and what does not fit into 6 kB of waiting packets is lost."""
    for host in cluster:
        line = ["rate", "2mbit", "burst", "3kb", "limit", "6kb"]
        host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *line)


def killed(cluster: Cluster) -> None:
    cluster["h2"].processes("network.py")[-1].send_signal(signal.SIGKILL)


FAULTS = {
    "h2's cable torn": Fault(torn),
    "h2's cable torn for 4 s": Fault(torn_for_a_while, ends=False),
    "a narrow line that loses packets": Fault(narrow, ends=False),
    "h2 switched off": Fault(lambda cluster: cluster["h2"].power_off()),
    "h1, where ranks meet, switched off": Fault(lambda cluster: cluster["h1"].power_off()),
    "h2's rank killed": Fault(killed),
    "h2's cable torn before COMMIT": Fault(torn, "COMMIT"),
    "h2's cable torn before the manifest": Fault(torn, "manifest"),
}


def over_the_network(name: str, stage: int, system: System, folder: Path) -> Outcome:
    fault = FAULTS[name]
    system.begin(folder / "run", stage, BEGIN)
    dead = folder / "dead"
    dead.mkdir()
    with Cluster(folder / "cluster", 2) as cluster:
        variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": PORT}
        variables |= {
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "tests", "tests/programs", "tests/faults")),
        }
        rank = [sys.executable, str(Path(__file__)), name, system.name, str(folder), str(stage)]
        rank.append(str(system.dataset) if isinstance(system, Megagpt) else "-")
        programs = []
        for r, host in enumerate(cluster):
            command = host.command(*rank, env=variables | {"RANK": str(r)}, cwd=ROOT)
            with (dead / f"output{r}").open("wb") as log:
                programs.append(subprocess.Popen(command, env=host.environment, stdout=log, stderr=subprocess.STDOUT))
        _until(lambda: (dead / "fault_at").exists() or not _running(programs), 120.0)
        fault.act(cluster)
        began = time.time()
        (dead / "done").touch()
        _until(lambda: not _running(programs), PATIENCE)
        seconds, hung = time.time() - began, _running(programs)
        codes = [program.poll() for program in programs]
    for program in programs:
        program.wait(30)  # it ended with its host
    text = "".join((dead / f"output{r}").read_text(errors="replace") for r in range(2))
    outcome = started_again(system, folder, stage, STEPS, Ended(codes, text, seconds, hung=hung))
    as_promised = 0 not in codes if fault.ends else codes == [0, 0]
    if not outcome.note and not as_promised:
        return Outcome(outcome.verdict, f"codes {codes}: {last_lines(text)}", outcome.lost, seconds)
    return outcome


def _running(programs: list[subprocess.Popen[bytes]]) -> bool:
    return any(program.poll() is None for program in programs)


def _until(happened: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.02)


def network() -> Iterator[Case]:
    if missing():
        return
    for name, fault in FAULTS.items():
        for stage in (1, 3):
            run = partial(over_the_network, name, stage)
            yield Case("G", f"{name}, stage {stage}", run, baseline=fault.where == "a step")


# --- the rank, a process on one of the hosts --------------------------------------------------------------------------


def main(name: str, system_name: str, folder: Path, stage: int, dataset: Path) -> int:
    def wait() -> None:
        (folder / "dead" / "fault_at").touch()
        while not (folder / "dead" / "done").exists():
            time.sleep(0.01)

    def wait_in_step(engine: Engine, output: Any) -> Any:
        wait()
        return output

    fault = FAULTS[name]
    if os.environ["RANK"] == "0" and fault.where != "a step":
        InSave(fault.where, "before", wait).arm()
    elif os.environ["RANK"] == "0":
        in_forward((BEGIN + 2,), wait_in_step, folder / "dead" / "reached")
    home = Path(tempfile.gettempdir())  # where straight runs would lie
    if system_name == Bare.name:
        return Bare(home).program(folder / "run", stage)()
    process_group.TIMEOUT = collectives.TIMEOUT = TIMEOUT
    patience = f"megagpt.guards.hang_timeout={SILENCE if fault.ends else 60}"
    return Megagpt(dataset, home).program(folder / "run", stage, STEPS, patience)()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])))
