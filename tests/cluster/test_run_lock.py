"""The lock of a run's folder over hosts: the file system of this machine, as a server of NFS, keeps it for all."""

import subprocess
import sys

import pytest
from rival_starts import refusal
from support import DEBUG_RUN, ROOT, overrides

OPTIONS = ['megagpt.every={"log": 1, "eval": 0, "save": 2}', "megagpt.schedule.max_steps=100000"]


@pytest.mark.process
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_of_two_starts_on_two_hosts_one_runs_and_one_is_refused(raise_cluster, dataset, tmp_path, rounds):
    """What trains is killed with SIGKILL, and the next two starts resume the run."""
    cluster, out_dir = raise_cluster(2), tmp_path / "run"
    hosts = {name: cluster[name] for name in ("h1", "h2")}
    arguments = ["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *OPTIONS)]
    for _ in range(rounds):
        starts = [
            subprocess.Popen(
                host.command(sys.executable, ROOT / "launch" / "pretrain.py", *arguments, cwd=ROOT),
                env=host.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for host in hosts.values()
        ]
        said, holder = refusal(
            starts, out_dir, lambda holder: hosts[holder["host"]].run("kill", "-9", str(holder["pid"])) and None
        )
        assert f"in use by another run, process {holder['pid']} on host {holder['host']}, since " in said
