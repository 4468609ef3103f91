"""Collectives: sums, gathers and votes over ranks. All of them work without a process group too, on one rank."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.distributed.process_group import TIMEOUT, Group, connect_together, rank, world_size
from megagpt.errors import UserError, raised_on_every_rank

T = TypeVar("T")


@cache
def neighbors(size: int) -> dist.ProcessGroup:
    """Return this rank's group of `size` neighboring ranks, counted from rank 0. Collective on first use."""
    if dist.get_backend() != "gloo":
        return dist.new_subgroups(size, timeout=TIMEOUT)[0]
    own = rank() // size
    groups = [_new_gloo_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return groups[own]


def new_gloo_group() -> Group:
    """Return a group of all ranks on their hosts, whose collectives do not mix with others; None for one rank.

    Collective.
    """
    return _new_gloo_group(None) if world_size() > 1 else None


def _new_gloo_group(ranks: list[int] | None) -> dist.ProcessGroup:
    def connect(_: int, timeout: timedelta) -> dist.ProcessGroup:
        return dist.new_group(ranks, timeout=timeout, backend="gloo")

    return connect_together(connect, lambda _, complaint: gather_objects(complaint))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the element-wise sum over ranks, the same on every rank."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """Return every rank's values (n,), as (world_size, n), on every rank."""
    if world_size() == 1:
        return values.detach().unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.detach().contiguous())
    return torch.stack(gathered)


def exchange(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send `sent[r]` of the values (n,) to each rank r, in order; return those that come, `received[r]` from r."""
    if world_size() == 1:
        return values
    arrived = values.new_empty(sum(received))
    dist.all_to_all_single(arrived, values, received, sent)
    return arrived


def on_every_rank(fact: bool) -> bool:
    """Tell, on every rank, whether a fact holds on all of them."""
    return all(gather_objects(fact))


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Return every rank's value, in rank order, on every rank.

    With a `group` it gathers over that group, also after this process has left the default one.
    """
    if group is None and world_size() == 1:
        return [value]
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


@contextmanager
def errors_on_every_rank(group: Group = None) -> Iterator[None]:
    """If the `with` block raises UserError on one rank, because of its host for example, every rank raises it.

    Without this the other ranks would wait in their next collective for a rank that has ended. Collective at the end
    of the block, which must contain no collective itself after what can raise.
    """
    complaint = ""
    try:
        yield
    except UserError as error:
        complaint = str(error)
    complaints = gather_objects((complaint, socket.gethostname()), group)
    if not any(text for text, _ in complaints):
        return
    first, text, host = next((r, text, host) for r, (text, host) in enumerate(complaints) if text)
    where = f"on rank {first}" + (f", host {host}" if len({host for _, host in complaints}) > 1 else "")
    raise UserError(text if all(text for text, _ in complaints) else f"{text} ({where})")


class StopVote:
    """Lets all ranks stop at the same step without making a step wait: a vote cast at one step is read at the next.

    The vote is a MAX all-reduce on the host, over a gloo group of its own, so that the GPU is never synchronized.
    Every rank reads the same outcome at the same step, even if only one of them was told to stop. Use it in a `with`
    block, which waits for the last vote: gloo aborts a process that ends while one is in flight.
    """

    def __init__(self) -> None:
        self._group = new_gloo_group()
        self._ballot = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pending is not None and raised_on_every_rank(error):  # otherwise the others may never vote
            self._pending.wait()

    def __call__(self, stop: bool) -> bool:
        """Cast this rank's vote; returns the outcome of the previous vote, False the first time."""
        if self._group is None:
            return stop
        outcome = False
        if self._pending is not None:
            self._pending.wait()
            outcome = bool(self._ballot.item())
        self._ballot = torch.tensor([int(stop or outcome)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return outcome
