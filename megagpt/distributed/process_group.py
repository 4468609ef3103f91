"""The process group, and each rank's number, device and output. All of it works without a group too."""

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Never

import torch
import torch.distributed as dist
from tqdm import tqdm

from megagpt.distributed.rank_variables import Place, join_launch, read_place
from megagpt.errors import OwnRankError, UserError
from megagpt.terminal import show

Group = dist.ProcessGroup | None  # None: the default one

TIMEOUT = timedelta(minutes=30)  # hashing a large checkpoint on a cold file system can exceed the default of 10
CONNECT = timedelta(seconds=10)  # for gloo's connections: it waits for an address as long, and for each rank five times
ATTEMPTS = 3
WAIT_FOR_OTHERS = 8  # times CONNECT: until the slowest rank knows whether it is connected


def init_process_group(store: dist.Store | None = None) -> torch.device:
    """Join the ranks that a launcher started, or be the only one; returns this rank's device.

    The ranks meet through `store`, if they already have one. Raises OwnRankError if this rank has no GPU of its own on
    a machine that has some.
    """
    place = join_launch()
    device = own_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # torch's default is all physical cores for each process: share them between the ranks.
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    if dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    # One rank needs no port, so that two such runs never collide.
    if place.world_size == 1:
        store = dist.HashStore()
    if backend == "gloo" and store is not None:
        _connect_by_gloo(store, place)
        return device
    dist.init_process_group(
        backend,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
    )
    return device


def _connect_by_gloo(store: dist.Store, place: Place) -> None:
    """Make the default group of ranks that have met through `store`. Raises UserError if that takes too long."""

    def connect(attempt: int, timeout: timedelta) -> dist.ProcessGroup:
        # torch numbers its groups, also those that failed, and the ranks look for each other under that number.
        dist.distributed_c10d._world.group_count = 0
        keys = dist.PrefixStore(f"gloo{attempt}", store)
        dist.init_process_group("gloo", timeout=timeout, store=keys, rank=place.rank, world_size=place.world_size)
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def exchange(attempt: int, complaint: str) -> list[str]:
        keys = [f"connected{attempt}/{r}" for r in range(place.world_size)]
        try:
            store.set(keys[place.rank], complaint or "yes")
            store.wait(keys, WAIT_FOR_OTHERS * CONNECT)
            return [value.removeprefix("yes") for value in (store.get(key).decode() for key in keys)]
        except RuntimeError:
            raise OwnRankError(
                f"rank {place.rank} on {socket.gethostname()} could not connect to all other ranks by gloo "
                f"({complaint or 'another rank did not report'}): one of them has ended (see above), or a firewall is "
                "between them"
            ) from None

    connect_together(connect, exchange)


def connect_together(
    connect: Callable[[int, timedelta], dist.ProcessGroup], exchange: Callable[[int, str], list[str]]
) -> dist.ProcessGroup:
    """Return the gloo group that `connect` makes. Collective; raises UserError if a rank cannot connect.

    On a busy machine it happens that two ranks each wait for the other to connect, where gloo would wait for five
    times TIMEOUT. All ranks then try again, also those that were connected: `exchange` hands each rank's complaint to
    all of them. Both functions get the number of the attempt.
    """
    # torch's wrapper for this level of debugging hides the timeout that is set below.
    short = TIMEOUT if dist.get_debug_level() == dist.DebugLevel.DETAIL else CONNECT
    for attempt in range(1, ATTEMPTS + 1):
        group, complaint = None, ""
        try:
            group = connect(attempt, short)
        except RuntimeError as error:
            complaint = f"rank {read_place(os.environ).rank} on {socket.gethostname()}: {str(error).splitlines()[0]}"
        complaints = list(filter(None, exchange(attempt, complaint)))
        if group is not None and not complaints:
            if dist.get_rank(group) >= 0:
                dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
            return group
        if group is not None:
            dist.destroy_process_group(group)
    raise UserError(
        f"{len(complaints)} ranks could not connect to all others by gloo in {ATTEMPTS} attempts ({complaints[0]}); "
        "see whether a firewall is between them, or start again"
    )


def leave() -> None:
    """Leave the group before the process ends: gloo's threads abort it if they outlive their group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device() -> torch.device:
    """Return this rank's device. Raises OwnRankError if there are more ranks than GPUs on a machine that has some.

    DS_ACCELERATOR=cpu leaves the GPUs alone, here as in DeepSpeed.
    """
    place, n_gpus = read_place(os.environ), visible_gpus()
    if n_gpus == 0:
        return torch.device("cpu")
    # --gpus-per-task, or a wrapper that sets CUDA_VISIBLE_DEVICES, shows each rank only its own GPU.
    shows_one = n_gpus == 1 and place.launcher in ("srun", "mpirun", "mpiexec")
    local_rank = 0 if shows_one else place.local_rank
    n_ranks = local_rank + 1
    if n_ranks > n_gpus:
        raise OwnRankError(
            f"LOCAL_RANK={local_rank}: {n_ranks} ranks need {n_ranks} GPUs, but {socket.gethostname()} shows {n_gpus}; "
            "lower --nproc, --num_gpus, the hostfile's slots, --nproc-per-node or --ntasks-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def visible_gpus() -> int:
    """Return the number of GPUs that this process may use: none with DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


def rank() -> int:
    """Return this rank's number; 0 without a group, whatever RANK an earlier launch left over."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_rank0(text: str, *, color: int | None = None) -> None:
    """Print on rank 0 only. A launcher or terminal that is gone, and no longer reads, does not end the run."""
    if not is_main():
        return
    with suppress(UserError):
        show(text, color=color)


def progress_bar(what: str, *, total: int, unit: str) -> "tqdm[Never]":
    """Return a bar for what takes longer than a second; it is drawn on rank 0's terminal alone, and removed at its end.

    Use it in a `with` block, and call its `update` for each unit.
    """
    disabled = None if is_main() else True  # with None, tqdm draws on a terminal alone
    # In a terminal without a size, as in some containers, tqdm itself draws nothing.
    columns, rows = shutil.get_terminal_size()
    return tqdm(total=total, desc=what, unit=unit, delay=1, leave=False, disable=disabled, ncols=columns, nrows=rows)
