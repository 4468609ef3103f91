"""A real Slurm on the hosts of a lab: munge, a controller on h1, and a node on every host.

Nodes claim more cores and GPUs than there are, so that batch scripts written for GPU nodes run here unchanged.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from hosts import TIMEOUT, Cluster, Host

T = TypeVar("T")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
NODE = "NodeName={name} NodeAddr={address} CPUs=64 Gres=gpu:8 State=UNKNOWN"
SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={controller}({address})
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
{more}
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


def start_slurm(cluster: Cluster, more: str = "") -> None:
    """All daemons on all hosts; back when every node is idle. `more` is added to slurm.conf."""
    folder = cluster.folder / "slurm"
    for name in ("state", "spool", "run", *(f"run.{host.name}" for host in cluster)):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    controller = cluster["h1"]
    nodes = "\n".join(NODE.format(name=host.name, address=host.address) for host in cluster)
    settings = {"controller": controller.name, "address": controller.address, "nodes": nodes, "more": more}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, **settings))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for n in range(8):
        (folder / f"gpu{n}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    cluster.environment["SLURM_CONF"] = str(folder / "slurm.conf")
    for host in cluster:
        host.environment["SLURM_CONF"] = str(folder / "slurm.conf")
    for service in (munged, slurmctld, slurmd):
        cluster.start(service)
    wait_for(lambda: node_states(controller), lambda states: set(states) == {"idle"}, 15)
    for host in cluster:
        host.count_all_as_daemons()


def munged(host: Host) -> None:
    folder = host.cluster.folder / "slurm"
    host.bind(folder / f"run.{host.name}", folder / "run")
    own = {name: folder / f"munged.{host.name}.{name}" for name in ("log", "pid", "seed")}
    files = [f"--{name}-file={path}" for name, path in own.items()]
    host.daemon("munged", "--force", f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'run/munge'}", *files)


def slurmctld(host: Host) -> None:
    if host.name == "h1":
        host.daemon("slurmctld")


def slurmd(host: Host) -> None:
    host.daemon("slurmd")


def node_states(host: Host) -> list[str]:
    return host.run("sinfo", "-N", "-h", "-o", "%T").stdout.split()


def job_state(host: Host, job: str) -> str:
    """Of a job that was not long ago; requeued jobs are PENDING again."""
    return field(host, job, "JobState")


def field(host: Host, job: str, name: str) -> str:
    shown = host.run("scontrol", "-o", "show", "job", job).stdout.split()
    return next(part.partition("=")[2] for part in shown if part.startswith(f"{name}="))


def wait_for(look: Callable[[], T], wanted: Callable[[T], bool], timeout: float = TIMEOUT) -> T:
    """Ask Slurm, which tells nobody, until it answers so."""
    until = time.monotonic() + timeout
    while not wanted(seen := look()):
        assert time.monotonic() < until, f"still {seen!r} after {timeout:.0f} s"
        time.sleep(0.2)
    return seen
