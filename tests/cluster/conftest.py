"""Fixtures: clusters of real hosts. Where a machine cannot raise them the tests are skipped, with the reason."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import board
import hosts
import processes
import pytest
import slurm_lab

Raise = Callable[[int], hosts.Cluster]


def _need(*programs: str) -> None:
    if reason := hosts.missing(*programs):
        (pytest.fail if os.environ.get("MEGAGPT_LAB") == "required" else pytest.skip)(reason)


@pytest.fixture(scope="session", autouse=True)
@processes.start_here
def _a_lab_can_be_raised() -> None:
    _need(*slurm_lab.NEEDED)


@pytest.fixture(scope="session")
def _a_browser_can_be_started() -> None:
    _need(*board.NEEDED)


@pytest.fixture(scope="module")
def raise_cluster(tmp_path_factory) -> Iterator[Raise]:
    """Clusters of so many hosts with sshd, until the module's tests have ended."""
    with ExitStack() as stack:

        def cluster(n_hosts: int) -> hosts.Cluster:
            raised = stack.enter_context(hosts.Cluster(tmp_path_factory.mktemp("cluster") / "lab", n_hosts))
            raised.start(hosts.sshd)
            return raised

        yield cluster
