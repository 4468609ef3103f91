"""A meeting of ranks that have no process group yet, through a store at MASTER_ADDR and MASTER_PORT.

Rank 0 serves the store; under torchrun its agent does, and serves the same one to the ranks that it restarts. It then
still holds what dead ranks wrote, and their addresses, so every attempt needs keys of its own. torchrun's count of
restarts cannot tell attempts apart, because each host's agent counts for itself (pytorch/pytorch#135712). Rank 0
draws a name for the attempt instead and hands it to each rank that asks, under a key that only this rank knows.
Every wait ends within the time that MEGAGPT_MEET_SECONDS sets, and names who was waited for.
"""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch.distributed as dist

from megagpt.distributed.launcher import hosts_of_ranks
from megagpt.errors import OwnRankError, UserError

WAIT_VARIABLE = "MEGAGPT_MEET_SECONDS"  # to be raised for file systems on which a start takes longer
MARGIN = 10.0  # seconds that the other ranks wait longer than rank 0, whose message names who is absent
TICK = 0.05
Report = dict[str, Any]  # of one rank, as JSON


class Meeting:
    """This rank's part in the meeting; `store` is what the process group may then use."""

    def __init__(self) -> None:
        self.rank, self.n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._address, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._seconds = _patience()
        self._until = time.monotonic() + self._seconds
        self._shared = self._open()
        self._answered: dict[int, bytes] = {}  # the last question of each rank
        self._attempt = uuid.uuid4().hex if self.rank == 0 else self._ask()
        self.store = dist.PrefixStore(self._attempt, self._shared)

    def report(self, topic: str, mine: Report, judge: Callable[[list[Report]], str]) -> None:
        """Send this rank's report to rank 0, whose complaint about all of them every rank raises as UserError."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            self.store.set(f"{topic}/verdict", self._verdict(topic, judge))
        complaint = self._wait_for_rank_0(self.store, f"{topic}/verdict")
        if complaint:
            self._leave(topic)
            raise UserError(complaint)

    def report_of(self, topic: str, rank: int) -> Report:
        report: Report = json.loads(self.store.get(f"{topic}/{rank}"))
        return report

    def _open(self) -> dist.TCPStore:
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._reach(listens=not serves)
        patience = timedelta(seconds=self._seconds)
        opened: SimpleQueue[dist.TCPStore | dist.DistError] = SimpleQueue()

        def connect() -> None:
            try:
                store = dist.TCPStore(
                    self._address, self._port, self.n_ranks, serves, timeout=patience, wait_for_workers=False
                )
            except dist.DistError as error:
                opened.put(error)
            else:
                opened.put(store)

        # In a thread, because torch waits without end for the answer of a program that is no store.
        Thread(target=connect, daemon=True).start()
        try:
            store = opened.get(timeout=self._seconds + MARGIN)
        except Empty:
            raise self._unreachable("a program that is none of this run's ranks listens there") from None
        if isinstance(store, dist.TCPStore):
            return store
        reason = str(store).splitlines()[0]
        if "server socket" not in reason:
            raise self._unreachable(reason)
        raise OwnRankError(
            f"{socket.gethostname()} cannot listen on port {self._port}, where ranks are to meet ({reason}); end what "
            "has it, or choose another: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
        )

    def _reach(self, *, listens: bool) -> None:
        """Wait until MASTER_ADDR resolves and, with `listens`, until a program listens there."""
        while True:
            try:
                if listens:
                    socket.create_connection((self._address, self._port), timeout=self._seconds).close()
                else:
                    socket.getaddrinfo(self._address, self._port)
                return
            except OSError as error:
                # UnicodeError: a name that is too long, or has an empty part.
                if time.monotonic() > self._until:
                    raise self._unreachable(str(error)) from None
            except UnicodeError as error:
                raise self._unreachable(str(error)) from None
            time.sleep(4 * TICK)

    def _unreachable(self, reason: str) -> OwnRankError:
        here, place = socket.gethostname(), f"MASTER_ADDR={self._address}, MASTER_PORT={self._port}"
        if self.rank == 0:
            return OwnRankError(
                f"{place} does not lead to {here}, where rank 0 is ({reason}); set MASTER_ADDR to {here}"
            )
        return OwnRankError(
            f"rank {self.rank} on {here} could not reach rank 0 at {place} within {self._seconds:.0f} s ({reason}): "
            "rank 0 has ended (see above), its host is down, a firewall is between them, or it is on another host"
        )

    def _ask(self) -> str:
        """Ask rank 0 for the name of this attempt, under a key that no dead rank has used."""
        question = uuid.uuid4().hex
        self._shared.set(f"question/{self.rank}", question)
        return self._wait_for_rank_0(self._shared, f"answer/{question}")

    def _answer(self, rank: int) -> None:
        """Tell a rank the name of this attempt, if it has asked; a dead rank's question may be there before its own."""
        if self._shared.check([f"question/{rank}"]):
            question = self._shared.get(f"question/{rank}")
            if question != self._answered.get(rank):
                self._shared.set(f"answer/{question.decode()}", self._attempt)
                self._answered[rank] = question

    def _wait_for_rank_0(self, store: dist.Store, key: str) -> str:
        try:
            store.wait([key], timedelta(seconds=self._seconds + MARGIN))
            return store.get(key).decode()
        except dist.DistError:
            raise OwnRankError(
                f"rank 0 ended while rank {self.rank} on {socket.gethostname()} met it; see above for the reason"
            ) from None

    def _verdict(self, topic: str, judge: Callable[[list[Report]], str]) -> str:
        absent = list(range(1, self.n_ranks))
        until = max(self._until, time.monotonic() + 15.0)
        while True:
            for rank in absent:
                self._answer(rank)
            absent = [rank for rank in absent if not self.store.check([f"{topic}/{rank}"])]
            if not absent:
                return judge([self.report_of(topic, r) for r in range(self.n_ranks)])
            if time.monotonic() > until:
                return self._absent(absent)
            time.sleep(TICK)

    def _absent(self, ranks: list[int]) -> str:
        hosts = hosts_of_ranks()
        names = ", ".join(f"rank {r}" + (f" of {hosts[r]}" if hosts else "") for r in ranks)
        return (
            f"{names} did not arrive within {self._seconds:.0f} s; see above why, or whether ssh gets there and "
            f"finds this folder and .venv. If starts do take so long, set {WAIT_VARIABLE} in ~/.deepspeed_env"
        )

    def _leave(self, topic: str) -> None:
        """Let rank 0, with which the store ends, wait until the others have read the verdict."""
        if self.rank != 0:
            self.store.add(f"{topic}/read", 1)
            return
        others = sum(self.store.check([f"{topic}/{r}"]) for r in range(1, self.n_ranks))
        until = time.monotonic() + 5
        while self.store.add(f"{topic}/read", 0) < others and time.monotonic() < until:
            time.sleep(0.01)


def _patience() -> float:
    """Return for how many seconds ranks wait for each other. Raises OwnRankError for a setting that is no number."""
    text = os.environ.get(WAIT_VARIABLE, "50")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < 86400.0:
        raise OwnRankError(f"{WAIT_VARIABLE}={text} is not a number of seconds up to a day; set 120, say")
    return seconds
