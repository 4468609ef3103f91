"""Ranks meet before they train: who does not arrive, who differs and who cannot be reached is named by its host."""

import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megagpt
from megagpt.distributed.collectives import broadcast_object, gather_objects, on_every_rank
from megagpt.distributed.interfaces import is_loopback, listen_for_gloo, remedy
from megagpt.distributed.launcher import adopt_slurms_ranks, hosts_of_ranks, local_ranks
from megagpt.distributed.process_group import init_process_group, is_main, own_device, world_size
from megagpt.errors import OwnRankError, UserError, writing_to

PATIENCE = "MEGAGPT_MEET_SECONDS"  # for file systems on which a start takes longer
SAME_PROGRAMS = "use the same checkout and the same .venv on all hosts"
PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "sentencepiece", "pydantic")
Said = dict[str, Any]


def meet() -> torch.device:
    """`init_process_group`, once all ranks have arrived with the same programs and reach each other.

    Raises UserError on every rank otherwise, within a minute.
    """
    adopt_slurms_ranks()
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return init_process_group()
    meeting = _Meeting()
    with ExitStack() as open_until_reached:
        meeting.say("arrival", _arrival(open_until_reached), _wrong_arrivals)
        neighbor = meeting.heard("arrival", (meeting.rank + local_ranks()) % meeting.n_ranks)
        meeting.say("reach", {"complaint": _unreachable(neighbor)}, _complaint)
    return init_process_group(meeting.store)


def check_equal_on_ranks(facts: Mapping[str, object], remedy: str) -> None:
    """Collective; raises UserError with the host and both values, if one of the facts is not the same on every rank."""
    said = gather_objects((socket.gethostname(), dict(facts)))
    if found := differences(said):
        raise UserError(f"{'; '.join(found)}; {remedy}")


def check_shared(folder: Path) -> None:
    """Collective; raises UserError if a rank does not see what rank 0 writes where `folder` is or will be."""
    if world_size() == 1:
        return
    mark = Path(broadcast_object(str(on_every_rank(lambda: mark_in(folder.absolute()) if is_main() else ""))))
    seen = gather_objects((socket.gethostname(), mark.exists()))
    if is_main():
        mark.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in seen if not sees}):
        raise UserError(
            f"megagpt.out_dir={folder} is not shared: what {seen[0][0]} writes there is not seen on "
            f"{', '.join(blind)}; set it to a folder of a file system that all hosts have"
        )


def mark_in(folder: Path) -> Path:
    """A new file, in the nearest folder above that exists."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    mark = there / f".megagpt_{uuid.uuid4().hex}"
    with writing_to(folder):
        mark.touch()
    return mark


def programs() -> dict[str, str]:
    """What must be the same on every host: Python, packages, and our own code by its hash."""
    code = {"megagpt's code (hash)": code_hash(Path(megagpt.__file__).parent)}
    return {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES} | code


def code_hash(package: Path) -> str:
    """Of every source file of a package, in whichever folder below it."""
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(package).as_posix(), file) for file in package.rglob("*.py")):
        digest.update(f"{name}\0{len(data := file.read_bytes())}\0".encode() + data)
    return digest.hexdigest()[:12]


def differences(said: Sequence[tuple[str, Mapping[str, object]]]) -> list[str]:
    """Of (host, facts): each fact that is not everywhere as on the first host, with the next host that differs."""
    first, expected = said[0]
    found = []
    for name in dict.fromkeys(name for _, facts in said for name in facts):
        value = expected.get(name, "absent")
        unlike = {host: facts.get(name, "absent") for host, facts in said if facts.get(name, "absent") != value}
        if unlike:
            host, other = next(iter(unlike.items()))
            more = f" (and not as on {first} on {len(unlike) - 1} hosts more)" if len(unlike) > 1 else ""
            found.append(f"{name} is {value} on {first}, but {other} on {host}{more}")
    return found


class _Meeting:
    """Ranks that have nothing yet but the store of rank 0, at MASTER_ADDR and MASTER_PORT."""

    def __init__(self) -> None:
        self.rank, self.n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._seconds = _patience()
        self._until = time.monotonic() + self._seconds
        self.store = self._open()

    def say(self, topic: str, mine: Said, judge: Callable[[list[Said]], str]) -> None:
        """Every rank says something and rank 0 judges all of it; its complaint is raised as UserError on every rank."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            self.store.set(f"{topic}/verdict", self._verdict(topic, judge))
        try:
            self.store.wait([f"{topic}/verdict"], timedelta(seconds=self._seconds + 10))
            complaint = self.store.get(f"{topic}/verdict").decode()
        except dist.DistError:
            raise UserError("rank 0 ended while the ranks met; it has said why") from None
        if complaint:
            self._leave(topic)
            raise UserError(complaint)

    def heard(self, topic: str, rank: int) -> Said:
        said: Said = json.loads(self.store.get(f"{topic}/{rank}"))
        return said

    def _open(self) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        patience = timedelta(seconds=self._seconds)
        try:
            return dist.TCPStore(address, port, self.n_ranks, serves, timeout=patience, wait_for_workers=False)
        except dist.DistError as error:
            here = socket.gethostname()
            if serves:
                raise OwnRankError(
                    f"{here} cannot listen on port {port}, where ranks are to meet ({str(error).splitlines()[0]}); "
                    "end what has it, or choose another: deepspeed --master_port N"
                ) from None
            raise OwnRankError(
                f"rank {self.rank} on {here} could not reach rank 0 at {address}:{port} within {self._seconds:.0f} s: "
                f"rank 0 has ended (see above), its host is down, or a firewall is between them"
            ) from None

    def _verdict(self, topic: str, judge: Callable[[list[Said]], str]) -> str:
        keys = [f"{topic}/{r}" for r in range(self.n_ranks)]
        try:
            self.store.wait(keys, timedelta(seconds=max(15.0, self._until - time.monotonic())))
        except dist.DistError:
            hosts = hosts_of_ranks()
            absent = [r for r, key in enumerate(keys) if not self.store.check([key])]
            names = ", ".join(f"rank {r}" + (f" of {hosts[r]}" if hosts else "") for r in absent)
            return (
                f"{names} did not arrive within {self._seconds:.0f} s; see above why, or whether ssh gets there and "
                f"finds this folder and .venv. If starts do take so long, set {PATIENCE} in ~/.deepspeed_env"
            )
        return judge([self.heard(topic, r) for r in range(self.n_ranks)])

    def _leave(self, topic: str) -> None:
        """The store ends with rank 0, so that waits until the others have read."""
        if self.rank != 0:
            self.store.add(f"{topic}/read", 1)
            return
        others = sum(self.store.check([f"{topic}/{r}"]) for r in range(1, self.n_ranks))
        until = time.monotonic() + 5
        while self.store.add(f"{topic}/read", 0) < others and time.monotonic() < until:
            time.sleep(0.01)


def _arrival(open_until_reached: ExitStack) -> Said:
    """What this rank says of itself."""
    said: Said = {"host": socket.gethostname(), "complaint": "", "programs": programs()}
    try:
        own_device()
        listener = open_until_reached.enter_context(listen_for_gloo())
        said["address"], said["port"] = listener.getsockname()[:2]
    except UserError as error:
        said["complaint"] = str(error)
    return said


def _wrong_arrivals(arrivals: list[Said]) -> str:
    if complaint := _complaint(arrivals):
        return complaint
    if found := differences([(said["host"], said["programs"]) for said in arrivals]):
        return f"{'; '.join(found)}; {SAME_PROGRAMS}"
    if len({said["host"] for said in arrivals}) > 1:
        for said in arrivals:
            if is_loopback(said["address"]):
                return (
                    f"the other hosts cannot reach {said['host']} at {said['address']}, which gloo would take there "
                    f"because its own name resolves to it; {remedy(os.environ['MASTER_ADDR'])}"
                )
    return ""


def _unreachable(neighbor: Said) -> str:
    try:
        socket.create_connection((neighbor["address"], neighbor["port"]), timeout=10).close()
    except OSError as error:
        return (
            f"{socket.gethostname()} cannot connect to {neighbor['host']} at {neighbor['address']}, where gloo listens "
            f"({error}): the wrong interface or a firewall; {remedy(os.environ['MASTER_ADDR'])}"
        )
    return ""


def _complaint(said: list[Said]) -> str:
    return next((one["complaint"] for one in said if one["complaint"]), "")


def _patience() -> float:
    text = os.environ.get(PATIENCE, "50")
    try:
        return float(text)
    except ValueError:
        raise OwnRankError(f"{PATIENCE}={text} is not a number of seconds") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
