"""The lab itself: its hosts are hosts, and nothing is left of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hosts import Cluster, sshd
from slurm_lab import start_slurm

HOSTS = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster(raise_cluster) -> Cluster:
    return raise_cluster(2)


def test_hosts_have_names_addresses_and_processes_of_their_own(cluster):
    said = cluster["h1"].run("pdsh", "-S", "-w", "h1,h2", "hostname; hostname -I").stdout.split("\n")
    assert sorted(filter(None, said)) == ["h1: 10.99.0.1 ", "h1: h1", "h2: 10.99.0.2 ", "h2: h2"]
    program = cluster["h2"].start("sh", "-c", "sleep 100 & echo there; wait")
    program.until("there")
    assert len(cluster["h2"].processes("sleep 100")) == 2  # the shell, and what it started
    assert not cluster["h1"].wait_for_rest(10)  # sshd takes a moment to end the session that pdsh had there
    for process in cluster["h2"].processes():
        process.kill()
    assert program.end() != 0


def test_folders_are_shared_unless_a_mount_covers_them_on_one_host(cluster, tmp_path):
    (tmp_path / "file").write_text("shared")
    assert cluster["h2"].run("cat", tmp_path / "file").stdout == "shared"
    cluster["h2"].tmpfs(tmp_path)
    assert cluster["h2"].run("ls", tmp_path).stdout == ""
    assert cluster["h1"].run("cat", tmp_path / "file").stdout == "shared"


def test_a_host_is_switched_off_with_all_that_runs_there_and_on_again_with_another_clock(cluster):
    program = cluster["h2"].start("sh", "-c", "sleep 100 & echo there; sleep 100")
    program.until("there")
    ran = cluster["h2"].processes()
    cluster["h2"].power_off()
    assert program.end() != 0
    assert not psutil.wait_procs(ran, 10)[1]
    assert cluster["h1"].run("ssh", "-oConnectTimeout=1", "h2", "true", check=False).returncode != 0
    cluster.clocks["h2"] = "-2h"
    cluster.power_on(2)
    now, there = (int(cluster["h1"].run(*ssh, "date", "+%s").stdout) for ssh in ([], ["ssh", "h2"]))
    assert now - there == pytest.approx(7200, abs=30)


def test_slurm_runs_a_job_on_two_nodes(raise_cluster):
    cluster = raise_cluster(2)
    start_slurm(cluster)
    done = cluster["h1"].run("srun", "--nodes=2", "--gpus-per-node=8", "hostname")
    assert sorted(done.stdout.split()) == ["h1", "h2"]


def test_nothing_is_left_of_a_lab_whose_tests_were_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from hosts import Cluster, sshd; from slurm_lab import start_slurm\n"
        "with Cluster(Path(sys.argv[1]), 2) as cluster:\n"
        "    cluster.start(sshd); start_slurm(cluster); print('up', flush=True); cluster['h1'].run('sleep', '100')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lab")]
    tests = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(HOSTS)})
    assert tests.stdout is not None
    assert tests.stdout.readline() == "up\n"
    below = psutil.Process(tests.pid).children(recursive=True)
    assert any("slurmd" in process.name() for process in below)
    tests.send_signal(signal.SIGKILL)
    tests.communicate()
    assert not psutil.wait_procs(below, 20)[1]


def test_two_labs_stand_side_by_side(cluster, tmp_path):
    with Cluster(tmp_path / "other", 2) as other:
        other.start(sshd)
        assert other["h1"].run("ssh", "h2", "hostname").stdout == "h2\n"
        other["h2"].power_off()
    assert cluster["h1"].run("ssh", "h2", "hostname").stdout == "h2\n"
