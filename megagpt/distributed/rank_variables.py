"""Read which rank this process is from its environment: the one place that knows the variables of each launcher.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as a person or Kubernetes may.
srun and the launchers of MPI number their processes in variables of their own, and leave the address to the user.
Variables that are half set, or left over from another launch, are refused by their names. torch is not imported here.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import OwnRankError, UserError

TORCHS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
ONE_RANK = "`unset RANK WORLD_SIZE` trains on one rank, and torchrun or deepspeed set both for several"
PORT = 29500  # the usual one of torch and deepspeed
OURS = "MEGAGPT_LAUNCH"  # set by `megagpt train` for the ranks that it starts: the command that a user typed


@dataclass(frozen=True)
class Launcher:
    """A launcher that numbers its processes in variables of its own."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    with_address: str  # how to start it so that the ranks know where to meet


OTHER_LAUNCHERS = (
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        # SLURM_NTASKS also counts, in a shell of salloc or a batch script, tasks that nobody has started.
        size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
        with_address="MASTER_ADDR={host} MASTER_PORT={port} srun",
    ),
    Launcher(
        name="mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        with_address="mpirun -x MASTER_ADDR={host} -x MASTER_PORT={port}",
    ),
    Launcher(
        name="mpiexec",  # of MPICH and Intel MPI
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        with_address="mpiexec -genv MASTER_ADDR {host} -genv MASTER_PORT {port}",
    ),
)


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks of a run; by default it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this host, as far as the launcher tells
    launcher: str = ""  # empty: a person, or a scheduler that sets torch's variables


def join_launch() -> Place:
    """Read this process's place, check that the ranks know where to meet, and set what torch and DeepSpeed read.

    Raises OwnRankError for a variable that is wrong; UserError, on every rank, for a launcher without an address.
    """
    place = read_place(os.environ)
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    if place.world_size > 1:
        _check_address(_given(os.environ), place)
    return place


def read_place(environment: Mapping[str, str]) -> Place:
    """Return the place that the variables tell. Raises OwnRankError if they are half set, or contradict each other."""
    given = _given(environment)
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        started = _numbered_by_launcher(given)
        if not started.launcher:
            _refuse_torchruns_settings(given)
        return started if started.world_size > 1 else Place()
    place = _numbered_by_torch(given)
    if place.launcher:
        return place
    started = _numbered_by_launcher(given)
    _refuse_torchruns_settings(given)
    if place.world_size < started.world_size or (
        place.world_size == started.world_size > 1 and place.rank != started.rank
    ):
        raise OwnRankError(
            f"RANK={place.rank} WORLD_SIZE={place.world_size}, but {started.launcher} started this process as rank "
            f"{started.rank} of {started.world_size}; `unset RANK WORLD_SIZE`, which another launch left over"
        )
    return started if place.world_size == started.world_size > 1 else place


def local_ranks() -> int:
    """Return the number of ranks on this host, as far as the launcher tells; 1 without a launcher."""
    return read_place(os.environ).local_size


def is_rank(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher, or torch's variables, make this process one of a run's ranks.

    A shell of `srun --pty`, or the only task of a job, is none. Raises OwnRankError as `read_place`.
    """
    given = _given(environment)
    return "RANK" in given or given.get("WORLD_SIZE", "1") != "1" or read_place(environment).world_size > 1


def ranks_variables(rank: int, n_ranks: int, port: int, *, command: str) -> dict[str, str]:
    """Return the variables that make a process one of n_ranks on this machine. `command`: what the user typed."""
    numbers = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks}
    # By address: a host's own name need not resolve.
    return {name: str(n) for name, n in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        OURS: command,
    }


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what a launcher above this process set, or an earlier launch left over."""
    names = {name for other in OTHER_LAUNCHERS for name in (other.rank, other.size, other.local_rank)}
    names |= {*TORCHS, OURS}
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(("PET_", "TORCHELASTIC_", "PMIX_RANK"))
    }


def unused_tasks(environment: Mapping[str, str]) -> str:
    """Return a note for a process that trains alone where Slurm has allocated more tasks; empty elsewhere."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks in ("1", environment.get("SLURM_STEP_NUM_TASKS")):
        return ""
    return (
        f"SLURM_NTASKS={tasks}, but srun did not start this process: it trains on one rank. For one on each task: "
        f"{_with_address('srun', socket.gethostname())} python launch/pretrain.py ..."
    )


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set to something: `export RANK=` sets none."""
    return {name: value.strip() for name, value in environment.items() if value.strip()}


def _numbered_by_launcher(given: Mapping[str, str]) -> Place:
    """Return the place that srun or MPI tells.

    They may stand above each other: mpirun starts its daemons by srun, one for each host. The one that started most
    processes is the nearest.
    """
    srun = OTHER_LAUNCHERS[0]
    by_srun = srun.rank in given and srun.size in given
    places = [
        Place(
            _number(given, other.rank),
            size := _number(given, other.size, at_least=1),
            _local_rank(given, other, size),
            # srun writes "4(x2)" for four on each of two hosts.
            int((re.match(r"[1-9]\d*", given.get(other.local_size, "")) or "1")[0]),
            other.name,
        )
        for other in OTHER_LAUNCHERS
        if other.rank in given
        and other.size in given
        # `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE beside its own variables, but not MPI_LOCALRANKID.
        and not (by_srun and other.local_rank not in given and other is not srun)
    ]
    if "PMIX_RANK" in given and "RANK" not in given and not any(other.size in given for other in OTHER_LAUNCHERS):
        raise OwnRankError(
            f"PMIX_RANK={given['PMIX_RANK']}: a launcher started this process that does not tell how many ranks there "
            "are; use mpirun, srun, torchrun or deepspeed, or `unset PMIX_RANK` to train on one rank"
        )
    return max(places, key=lambda place: place.world_size, default=Place())


def _local_rank(given: Mapping[str, str], launcher: Launcher, size: int) -> int:
    for name in (launcher.local_rank, "LOCAL_RANK"):
        if name in given:
            return _number(given, name)
    if size == 1 or "RANK" in given:  # the latter are numbered by a person
        return 0
    raise OwnRankError(
        f"{launcher.rank}={given[launcher.rank][:40]} {launcher.size}={size} are set without {launcher.local_rank}; "
        "set LOCAL_RANK to this process's number on its host, or "
        f"`unset {launcher.rank} {launcher.size}` to train on one rank"
    )


def _numbered_by_torch(given: Mapping[str, str]) -> Place:
    """Return the place that RANK and WORLD_SIZE tell."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in given:
            raise OwnRankError(f"{other}={given[other][:40]} is set, but {name} is not; {ONE_RANK}")
    world_size, rank = _number(given, "WORLD_SIZE", at_least=1), _number(given, "RANK")
    if rank >= world_size:
        raise OwnRankError(f"RANK={rank} is not below WORLD_SIZE={world_size}; {ONE_RANK}")
    local_rank = _number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else 0
    sizes = [_number(given, name, at_least=1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in given]
    signs = {OURS: "megagpt train", "TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    launcher = next((name for sign, name in signs.items() if sign in given), "")
    return Place(rank, world_size, local_rank, next(iter(sizes), 1), launcher)


def _refuse_torchruns_settings(given: Mapping[str, str]) -> None:
    """Refuse to train alone, or as a host's only rank, where torchrun was to start the ranks, as in Kubernetes."""
    per_host, hosts = given.get("PET_NPROC_PER_NODE", "1"), given.get("PET_NNODES", "1")
    wanted = {"PET_NPROC_PER_NODE": per_host} if per_host.isdecimal() and int(per_host) > 1 else {}
    if "RANK" not in given and hosts not in ("1", "1:1"):
        wanted["PET_NNODES"] = hosts
    for name, value in wanted.items():
        raise OwnRankError(
            f"{name}={value[:40]} is for torchrun, which did not start this process; start `torchrun "
            f"launch/pretrain.py ...`, which reads it, or `unset {' '.join(wanted)}` to train on one rank"
        )


def _check_address(given: Mapping[str, str], place: Place) -> None:
    """Check MASTER_ADDR and MASTER_PORT. What all ranks of a launcher lack, rank 0 reports for all."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing and place.launcher in [other.name for other in OTHER_LAUNCHERS]:
        host = "127.0.0.1" if place.local_size == place.world_size else socket.gethostname()
        [rank] = [other.rank for other in OTHER_LAUNCHERS if other.name == place.launcher]
        raise UserError(
            f"{place.launcher} started {place.world_size} ranks without {' and '.join(missing)}, where they are to "
            f"meet; start `{_with_address(place.launcher, host)} ...`, or each as a run of its own by "
            f"`... env -u {rank} python launch/pretrain.py ...`"
        )
    if missing:
        raise OwnRankError(
            f"RANK={place.rank} WORLD_SIZE={place.world_size} is set without {' and '.join(missing)}; set MASTER_ADDR "
            f"to rank 0's host and MASTER_PORT={PORT} on every rank. Or {ONE_RANK}"
        )
    _number(given, "MASTER_PORT", at_least=1, at_most=65535)


def _with_address(launcher: str, host: str) -> str:
    [command] = [other.with_address for other in OTHER_LAUNCHERS if other.name == launcher]
    return command.format(host=host, port=PORT)


def _number(given: Mapping[str, str], name: str, *, at_least: int = 0, at_most: int = 2**31 - 1) -> int:
    """Return a variable's whole number. Raises OwnRankError if it is another text, or out of bounds."""
    text = given.get(name, "")
    if text.isdecimal() and len(text) < 11 and at_least <= int(text) <= at_most:
        return int(text)
    below = f" to {at_most}" if at_most < 2**31 - 1 else " up"
    way_out = ONE_RANK if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") else f"set {name}, or `unset {name}`"
    raise OwnRankError(f"{name}={text[:40]!r} is not a whole number from {at_least}{below}; {way_out}")
