"""Trials over the hosts of a hostfile: the tuner is killed, a host is lost, and unready hosts are told before any."""

import json
import re
from pathlib import Path

import pytest
from hosts import Cluster, Program
from slurm_lab import wait_for
from support import DEBUG_RUN

SPACE = {"megagpt.regularization.dropout": {"low": 0.0, "high": 0.2}}
TRAIN = "megagpt train"


@pytest.fixture(scope="module")
def cluster(raise_cluster) -> Cluster:
    return raise_cluster(2)


def words(folder: Path, dataset: Path, *more: str) -> list[str]:
    """The words of a command that runs two trials long enough to be stopped."""
    (folder / "space.json").write_text(json.dumps(SPACE))
    data = [f"megagpt.data.{key}={dataset}" for key in ("train.0.path", "val")]
    steps = ["megagpt.schedule.max_steps=120", "megagpt.every.eval=10", "tensorboard.enabled=false"]
    command = ["python", "-m", "megagpt", "tune", str(DEBUG_RUN), "--space", str(folder / "space.json")]
    return [*command, "--study", str(folder / "study"), "--trials", "2", *data, *steps, *more]


def until_both_train(study: Path, tuner: Program) -> None:
    def evaluated(number: int) -> bool:
        metrics = study / "trials" / f"{number:04d}" / "metrics.jsonl"
        return metrics.exists() and "val/loss" in metrics.read_text()

    tuner.until("looking at 2 hosts")
    wait_for(lambda: evaluated(0) and evaluated(1), bool)


def last_steps(study: Path) -> list[int]:
    logs = [json.loads(path.read_text().splitlines()[-1]) for path in sorted(study.glob("trials/*/metrics.jsonl"))]
    return [row["step"] for row in logs]


@pytest.mark.long
def test_trials_on_hosts_end_with_the_tuner_and_outlive_a_host(cluster, dataset, tmp_path):
    hostfile, study = cluster.hostfile(), tmp_path / "study"
    command = words(tmp_path, dataset, "--hostfile", str(hostfile))
    tuner = cluster["h1"].start(*command)
    until_both_train(study, tuner)
    assert {host.name: len(host.processes(TRAIN)) > 0 for host in cluster} == {"h1": True, "h2": True}
    for process in cluster["h1"].processes("megagpt tune"):
        process.kill()
    assert not cluster.rest(60)
    stopped = last_steps(study)
    assert max(stopped) < 120

    tuner = cluster["h1"].start(*command)
    tuner.until("resuming trial 0, 1")
    wait_for(lambda: min(now - before for now, before in zip(last_steps(study), stopped, strict=True)), lambda n: n > 0)
    for process in cluster["h2"].processes("sshd: "):
        process.kill()
    tuner.until("host h2 is lost")
    assert tuner.end() == 0, tuner.output
    assert not cluster.rest(60)
    assert re.findall(r"^trial (\d): \d", tuner.output, re.MULTILINE) in (["0", "1"], ["1", "0"])
    assert last_steps(study) == [120, 120]


def test_a_host_that_is_not_reached_is_told_before_any_trial(cluster, dataset, tmp_path):
    hostfile = cluster.hostfile("hh2 slots=1")
    done = cluster["h1"].run(*words(tmp_path, dataset, "--hostfile", str(hostfile)), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no trial was started:\nhh2: ssh: ")
    assert len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "study").exists()


@pytest.mark.long
def test_hosts_that_cannot_run_the_trials_are_told_at_once(cluster, dataset, tmp_path):
    hostfile = cluster.hostfile("h1 slots=999", "h2 slots=1")
    (tmp_path / "local").mkdir()
    cluster["h2"].tmpfs(tmp_path / "local")
    study = tmp_path / "local" / "study"
    command = words(tmp_path, dataset, "--hostfile", str(hostfile), "--study", str(study))
    done = cluster["h1"].run(*command, check=False)
    assert done.returncode == 2
    assert sorted(line[:40] for line in done.stderr.splitlines()) == [
        "error: no trial was started:",
        "h1: slots: slots=999 in the hostfile, bu",
        f"h2: study: {study} is not seen there; "[:40],
    ]
    assert "set slots=" in done.stderr
    assert not study.exists()
