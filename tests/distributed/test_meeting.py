"""Ranks that meet through a store: what a dead attempt left there, and programs that are no store."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from support import PROGRAMS, environment, torchrun

from megagpt.distributed import meeting
from megagpt.distributed.meeting import Meeting, Report
from megagpt.errors import OwnRankError, UserError


@pytest.fixture
def environ(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(meeting, "MARGIN", 0.5)
    return monkeypatch.setenv


@pytest.fixture
def agent(environ):
    """The store that torchrun's agent serves to all attempts."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    environ("TORCHELASTIC_USE_AGENT_STORE", "True")
    environ("MASTER_PORT", str(store.port))
    return store


def meet(environ, attempt: str, complaint: str = "") -> list[str]:
    """Let two ranks meet and report their attempt; returns what rank 0 received, and what each raised."""
    seen: list[str] = []

    def judge(reports: list[Report]) -> str:
        seen.extend(report["attempt"] for report in reports)
        return complaint

    def report(rank: Meeting) -> None:
        try:
            rank.report("arrival", {"attempt": attempt}, judge)
        except UserError as error:
            seen.append(str(error))

    environ("RANK", "0")
    first = Meeting()
    environ("RANK", "1")
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: report(Meeting()))
        pool.submit(report, first).result()
        other.result()
    return sorted(seen)


def test_ranks_that_torchrun_restarts_do_not_read_what_dead_ranks_wrote(agent, environ):
    assert meet(environ, "1") == ["1", "1"]
    assert meet(environ, "2", "no") == ["2", "2", "no", "no"]
    # A rank that died while it asked.
    agent.set("question/1", "of a dead rank")
    assert meet(environ, "3") == ["3", "3"]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("address", ["nohost.invalid", "x" * 70])
def test_an_address_that_does_not_resolve_is_named(environ, rank, address):
    environ("RANK", rank)
    environ("MASTER_ADDR", address)
    environ("MASTER_PORT", "29500")
    environ("MEGAGPT_MEET_SECONDS", "0.1")
    message = "does not lead to" if rank == "0" else "could not reach rank 0"
    with pytest.raises(OwnRankError, match=message) as refused:
        Meeting()
    assert f"MASTER_ADDR={address}" in str(refused.value)


def test_a_program_that_is_no_store_is_not_waited_for_without_end(environ):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ("RANK", "1")
        environ("MASTER_PORT", str(silent.getsockname()[1]))
        environ("MEGAGPT_MEET_SECONDS", "0.5")
        with pytest.raises(OwnRankError, match="a program that is none of this run's ranks listens there"):
            Meeting()


@pytest.mark.parametrize("seconds", ["soon", "nan", "0", "inf"])
def test_the_patience_of_ranks_is_a_number_of_seconds(environ, seconds):
    environ("RANK", "1")
    environ("MASTER_PORT", "29500")
    environ("MEGAGPT_MEET_SECONDS", seconds)
    with pytest.raises(OwnRankError, match=f"MEGAGPT_MEET_SECONDS={seconds} is not a number of seconds"):
        Meeting()


LONELY = """
from datetime import timedelta
import torch.distributed as dist
from megagpt.distributed import process_group
from megagpt.errors import OwnRankError

process_group.CONNECT = timedelta(seconds=0.5)
try:
    process_group.init_process_group(dist.HashStore())
except OwnRankError as error:
    print(error)
"""


@pytest.mark.process
def test_a_rank_whose_neighbor_ended_after_they_met_ends_too():
    alone = environment() | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", LONELY], env=alone, capture_output=True, text=True, timeout=120)
    assert "could not connect to all other ranks by gloo" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.process
def test_ranks_connect_again_together_where_only_some_of_them_failed():
    done = torchrun(3, PROGRAMS / "stumbling_ranks.py", timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    reports = json.loads(done.stdout.splitlines()[-1])
    assert len(reports) == 3
    for report in reports:
        refused = report.pop("refused")
        assert report == {"sum": 3, "votes": [False, True], "gathered": [[0, 1, 2]] * 4, "long": True}
        assert "1 ranks could not connect to all others by gloo in 3 attempts (rank 2 on " in refused
