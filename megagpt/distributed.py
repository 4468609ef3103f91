"""Rank facts and the few collectives the rest of the package needs. All of it works without a process group."""

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.errors import OwnRankError, UserError, on_every_rank
from megagpt.terminal import escape_unknown_letters

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: the default one

TIMEOUT = timedelta(minutes=30)  # hashing a large checkpoint on a cold file system can take longer than the usual 10


def init_process_group(store: dist.Store | None = None) -> torch.device:
    """Join the ranks that deepspeed, torchrun or srun started, or stand alone; returns this rank's device.

    With a `store` they know each other by it already. Raises OwnRankError if this rank has no GPU of its own on a
    machine that has some.
    """
    adopt_slurms_ranks()
    device = own_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_ranks()))  # it counts physical cores
    if dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:  # plain `python launch/pretrain.py`: no port, so two of them never collide
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        store = dist.HashStore()
    dist.init_process_group(
        backend,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    return device


def leave() -> None:
    """Before the process ends: a thread of gloo's that is still there when its group is torn down would abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def adopt_slurms_ranks() -> None:
    """Under srun, set what deepspeed and torchrun set."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def own_device() -> torch.device:
    """This rank's; raises OwnRankError if there are more ranks than GPUs on a machine that has some.

    DS_ACCELERATOR=cpu leaves the GPUs alone, here as in DeepSpeed.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    there_are = torch.cuda.device_count()
    if there_are == 1 and "SLURM_LOCALID" in os.environ:
        local_rank = 0  # --gpus-per-task shows each task its own GPU alone
    wanted = local_rank + 1
    if wanted > there_are:
        raise OwnRankError(
            f"{wanted} ranks need {wanted} GPUs, but {socket.gethostname()} has {there_are}; "
            "lower --num_gpus, the hostfile's slots or --ntasks-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def local_ranks() -> int:
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, deepspeed, srun
    return next((int(os.environ[name]) for name in names if name in os.environ and "RANK" in os.environ), 1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@cache
def neighbors(size: int) -> dist.ProcessGroup:
    """The group of `size` neighboring ranks that this one is in, counted from rank 0. Collective."""
    group, _ = dist.new_subgroups(size, timeout=TIMEOUT)
    return group


def is_main() -> bool:
    return rank() == 0


def say(text: str) -> None:
    """Print once, not once per rank. A launcher or terminal that is gone and reads no more ends no run."""
    if not is_main():
        return
    escape_unknown_letters()
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum; every rank gets the same numbers."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """values (n,) of each rank -> (world_size, n), on every rank."""
    if world_size() == 1:
        return values.detach().unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.detach().contiguous())
    return torch.stack(gathered)


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Every rank's value, in rank order, on every rank.

    Never of fewer ranks than the group has, also after this process has left the default one.
    """
    if group is None and world_size() == 1:
        return [value]
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def together(check: Callable[[], T], group: Group = None) -> T:
    """Run something that only this rank's host can judge; if it fails on one rank, every rank raises its message.

    Without this the others would wait in their next collective for a rank that has gone.
    """
    result, complaint = None, ""
    try:
        result = check()
    except UserError as error:
        complaint = str(error)
    said = gather_objects((complaint, socket.gethostname()), group)
    if not any(text for text, _ in said):
        return cast(T, result)
    first, text, host = next((r, text, host) for r, (text, host) in enumerate(said) if text)
    where = f"on rank {first}" + (f", host {host}" if len({host for _, host in said}) > 1 else "")
    raise UserError(text if all(text for text, _ in said) else f"{text} ({where})")


class StopVote:
    """Agrees on stopping without making a step wait: the vote cast at one step boundary is read at the next.

    The ballot is a MAX all-reduce on the host, over a gloo group of its own, so the GPU is never synchronized.
    Every rank reads the same vote at the same step, even when only one of them was told to stop. Inside `with`, which
    waits for the last vote: a process that ends while one is under way, on a slow network, is aborted by gloo.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size() > 1 else None
        self._ballot = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pending is not None and on_every_rank(error):  # else the others may never vote
            self._pending.wait()

    def __call__(self, stop: bool) -> bool:
        """Cast this rank's vote; returns the outcome of the previous one (False the first time)."""
        if self._group is None:
            return stop
        outcome = False
        if self._pending is not None:
            self._pending.wait()
            outcome = bool(self._ballot.item())
        self._ballot = torch.tensor([int(stop or outcome)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return outcome
