"""Fixtures: clusters of real hosts. Where a machine cannot raise them the tests are skipped, with the reason."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import hosts
import pytest
import slurm_lab

Raise = Callable[[int], hosts.Cluster]


@pytest.fixture(scope="session", autouse=True)
def _a_lab_can_be_raised() -> None:
    if reason := hosts.missing(*slurm_lab.NEEDED):
        (pytest.fail if os.environ.get("MEGAGPT_LAB") == "required" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def raise_cluster(tmp_path_factory) -> Iterator[Raise]:
    """Clusters of so many hosts with sshd, until the module's tests have ended."""
    with ExitStack() as stack:

        def cluster(n_hosts: int) -> hosts.Cluster:
            raised = stack.enter_context(hosts.Cluster(tmp_path_factory.mktemp("cluster") / "lab", n_hosts))
            raised.start(hosts.sshd)
            return raised

        yield cluster
