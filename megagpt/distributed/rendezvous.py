"""Rendezvous: ranks meet before they train, and a host that is missing, differs or cannot be reached is named."""

import hashlib
import os
import platform
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import megagpt
from megagpt.distributed.collectives import broadcast_object, errors_on_every_rank, gather_objects
from megagpt.distributed.interfaces import interface_advice, is_loopback, listen_for_gloo
from megagpt.distributed.meeting import Meeting, Report
from megagpt.distributed.process_group import init_process_group, is_main, own_device, world_size
from megagpt.distributed.rank_variables import join_launch
from megagpt.errors import UserError, writing_to

SAME_PROGRAMS = "use the same checkout and the same .venv on all hosts"
PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "sentencepiece", "pydantic")


def meet() -> torch.device:
    """Call `init_process_group` after checking that all ranks run the same programs and reach each other.

    Otherwise raises UserError on every rank, within a minute.
    """
    place = join_launch()
    if dist.is_initialized() or place.world_size == 1:
        return init_process_group()
    meeting = Meeting()
    with ExitStack() as open_until_reached:
        meeting.report("arrival", _arrival(open_until_reached), _wrong_arrivals)
        neighbor = meeting.report_of("arrival", (meeting.rank + place.local_size) % meeting.n_ranks)
        meeting.report("reach", {"complaint": _unreachable(neighbor)}, _complaint)
    return init_process_group(meeting.store)


def check_equal_on_ranks(facts: Mapping[str, object], advice: str) -> None:
    """Raise UserError with the host and both values if one of the facts differs between ranks. Collective."""
    reports = gather_objects((socket.gethostname(), dict(facts)))
    if found := differences(reports):
        raise UserError(f"{'; '.join(found)}; {advice}")


def check_shared(folder: Path) -> None:
    """Raise UserError if a rank does not see a file that rank 0 writes where `folder` is or will be. Collective."""
    if world_size() == 1:
        return
    with errors_on_every_rank():
        written = str(mark_in(folder.absolute())) if is_main() else ""
    mark = Path(broadcast_object(written))
    seen = gather_objects((socket.gethostname(), mark.exists()))
    if is_main():
        mark.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in seen if not sees}):
        raise UserError(
            f"megagpt.out_dir={folder} is not shared: what {seen[0][0]} writes there is not seen on "
            f"{', '.join(blind)}; set megagpt.out_dir to a folder of a file system that all hosts have"
        )


def mark_in(folder: Path) -> Path:
    """Create a new file in `folder`, or in the nearest folder above it that exists; returns its path."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    mark = there / f".megagpt_{uuid.uuid4().hex}"
    with writing_to(folder):
        mark.touch()
    return mark


def programs() -> dict[str, str]:
    """Return what must be the same on every host: versions of Python and packages, and the hash of our own code."""
    code = {"megagpt's code (hash)": code_hash(Path(megagpt.__file__).parent)}
    return {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES} | code


def code_hash(package: Path) -> str:
    """Hash every source file of a package, in its folder and those below."""
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(package).as_posix(), file) for file in package.rglob("*.py")):
        digest.update(f"{name}\0{len(data := file.read_bytes())}\0".encode() + data)
    return digest.hexdigest()[:12]


def differences(reports: Sequence[tuple[str, Mapping[str, object]]]) -> list[str]:
    """Return a line for each fact whose value differs from the first host's, naming one host that differs.

    `reports` are (host, facts).
    """
    first, expected = reports[0]
    found = []
    for name in dict.fromkeys(name for _, facts in reports for name in facts):
        value = expected.get(name, "absent")
        unlike = {host: facts.get(name, "absent") for host, facts in reports if facts.get(name, "absent") != value}
        if unlike:
            host, other = next(iter(unlike.items()))
            more = f" (and not as on {first} on {len(unlike) - 1} hosts more)" if len(unlike) > 1 else ""
            found.append(f"{name} is {value} on {first}, but {other} on {host}{more}")
    return found


def _arrival(open_until_reached: ExitStack) -> Report:
    """Return this rank's first report: host, programs, and where it listens or why it cannot."""
    report: Report = {"host": socket.gethostname(), "complaint": "", "programs": programs()}
    try:
        own_device()
        listener = open_until_reached.enter_context(listen_for_gloo())
        report["address"], report["port"] = listener.getsockname()[:2]
    except UserError as error:
        report["complaint"] = str(error)
    return report


def _wrong_arrivals(arrivals: list[Report]) -> str:
    """Return what is wrong with the first reports of all ranks; empty if nothing is."""
    if complaint := _complaint(arrivals):
        return complaint
    if found := differences([(report["host"], report["programs"]) for report in arrivals]):
        return f"{'; '.join(found)}; {SAME_PROGRAMS}"
    if len({report["host"] for report in arrivals}) > 1:
        for report in arrivals:
            if is_loopback(report["address"]):
                return (
                    f"the other hosts cannot reach {report['host']} at {report['address']}, which gloo takes there "
                    f"because its own name resolves to it; {interface_advice(os.environ['MASTER_ADDR'])}"
                )
    return ""


def _unreachable(neighbor: Report) -> str:
    """Return why this rank cannot connect to another; empty if it can."""
    try:
        socket.create_connection((neighbor["address"], neighbor["port"]), timeout=10).close()
    except OSError as error:
        return (
            f"{socket.gethostname()} cannot connect to {neighbor['host']} at {neighbor['address']}, where gloo listens "
            f"({error}): the wrong interface or a firewall; {interface_advice(os.environ['MASTER_ADDR'])}"
        )
    return ""


def _complaint(reports: list[Report]) -> str:
    """Return the first complaint of a rank; empty if there is none."""
    return next((report["complaint"] for report in reports if report["complaint"]), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
