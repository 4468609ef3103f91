"""The batch scripts in a real Slurm: a run that is cut in every way ends as if nothing had been."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from data_support import shard_bytes, write_texts
from event_files import board, drawn
from hosts import Cluster
from slurm_lab import ENDED, field, job_state, start_slurm, wait_for
from support import DEBUG_RUN, ROOT, metric, read_json

from megagpt.checkpoint.commit import committed
from megagpt.data.manifest import BUILD_DIR
from megagpt.guards.restarts import last_logged

OUT_DIR = Path("runs/gpt2_124m")  # of the README's run file
[TRAIN] = re.findall(r"^sbatch launch/slurm/pretrain.sbatch .*?(?=\s+#)", (ROOT / "README.md").read_text(), re.M)

MORE = """\
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@pytest.fixture(scope="module")
def cluster(raise_cluster) -> Cluster:
    cluster = raise_cluster(2)
    start_slurm(cluster, MORE)
    return cluster


def checkout(folder: Path, dataset: Path, *, steps: int, batch: int = 8) -> Path:
    """A copy of this checkout whose README run file is a tiny one, and whose batch script says two nodes of one GPU."""
    for name in ("launch", "megagpt", "data_tools"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "ds_configs").mkdir()
    run = read_json(DEBUG_RUN) | {"train_batch_size": batch}
    run["megagpt"] |= {"out_dir": str(OUT_DIR), "every": {"log": 1, "eval": 20, "save": 20, "sample": 0}}
    run["megagpt"]["data"] |= {"train": [{"path": str(dataset)}], "val": str(dataset)}
    run["megagpt"]["schedule"]["max_steps"] = steps
    (folder / "ds_configs" / "gpt2_124m.json").write_text(json.dumps(run))
    script = folder / "launch" / "slurm" / "pretrain.sbatch"
    text = script.read_text()
    for option, value in {"nodes": 2, "ntasks-per-node": 1, "gpus-per-node": 1}.items():
        text, n = re.subn(rf"^(#SBATCH --{option})=.*$", rf"\1={value}", text, flags=re.M)
        assert n == 1
    script.write_text(text)
    return folder


def sbatch(cluster: Cluster, folder: Path, command: str) -> str:
    return cluster["h1"].run(*shlex.split(command), cwd=folder).stdout.split()[-1]


def until_step(folder: Path, step: int) -> int:
    return wait_for(lambda: last_logged(folder / OUT_DIR / "metrics.jsonl"), lambda logged: logged >= step)


def until_requeued(cluster: Cluster, job: str, times: int, *changes: str) -> None:
    """Slurm lets a job that was put back wait for two minutes; here it starts in two seconds.

    Not at once: Slurm counts credentials in whole seconds, and one of the second in which the last was revoked is void.
    """
    wait_for(
        lambda: [field(cluster["h1"], job, name) for name in ("JobState", "Restarts")], ["PENDING", str(times)].__eq__
    )
    cluster["h1"].run("scontrol", "update", f"JobId={job}", "StartTime=now+2", *changes)


def until_end(cluster: Cluster, job: str) -> str:
    return wait_for(lambda: job_state(cluster["h1"], job), ENDED.__contains__, 300)


def log_of(folder: Path, job: str, name: str = "megagpt") -> str:
    return (folder / f"slurm-{name}-{job}.out").read_text()


def test_the_readmes_command_saves_when_signaled_goes_back_into_the_queue_and_finishes(cluster, dataset, tmp_path):
    """What --signal does before a time limit is sent by hand."""
    folder = checkout(tmp_path / "checkout", dataset, steps=100)
    job = sbatch(cluster, folder, TRAIN)
    until_step(folder, 15)
    cluster["h1"].run("scancel", "--signal=USR1", job)
    until_requeued(cluster, job, 1)
    [*_, saved] = committed(folder / OUT_DIR)
    assert until_end(cluster, job) == "COMPLETED", log_of(folder, job)
    log = log_of(folder, job)
    assert "x 2 ranks" in log
    assert log.count("(SIGUSR1) and saved") == 1
    assert f"resuming from {saved.relative_to(folder)}" in log
    assert "finished at step 100" in log
    assert list(metric(folder / OUT_DIR, "train/loss")) == list(range(1, 101))
    assert field(cluster["h1"], job, "Restarts") == "1"
    assert not cluster["h1"].run("squeue", "--noheader").stdout
    assert not cluster.rest()


def test_a_rendered_script_is_taken_and_a_mistake_is_not_tried_again(cluster, tmp_path):
    """Also if one rank ends later than the other, as on a busy host."""
    folder = checkout(tmp_path / "checkout", Path("nowhere"), steps=8)
    (folder / "later.sh").write_text('"$@"\ncode=$?\n[ "$SLURM_PROCID" = 0 ] || sleep 3\nexit $code\n')
    command = "python -m megagpt slurm ds_configs/gpt2_124m.json --nodes 2 --gpus-per-node 1 --time 5 --partition all"
    job = sbatch(cluster, folder, f"{command} --container 'bash later.sh' --sbatch comment=rendered")
    assert until_end(cluster, job) == "FAILED"
    assert field(cluster["h1"], job, "ExitCode") == "2:0"
    assert field(cluster["h1"], job, "Restarts") == "0"
    assert field(cluster["h1"], job, "Comment") == "rendered"
    assert log_of(folder, job).count("error: there is no dataset folder nowhere") == 1


def test_builds_on_one_node_and_on_two_make_the_same_bytes_as_one_here_also_when_cut(cluster, tmp_path):
    folder = checkout(tmp_path / "checkout", Path("nowhere"), steps=8)
    write_texts(folder / "books", 60)
    build = "--input books --out {} vocab_size=300 val_fraction=0.2"
    script = "sbatch --nodes {} --cpus-per-task 2 launch/slurm/build_data.sbatch " + build
    one, two = (sbatch(cluster, folder, script.format(n, f"on_{n}")) for n in (1, 2))
    wait_for((folder / "on_2" / BUILD_DIR).exists, bool)
    cluster["h1"].run("scancel", "--batch", "--signal=USR1", two)  # as --signal does before the time limit
    cluster["h1"].run("python", "-m", "data_tools", "build", *build.format("here").split(), cwd=folder)
    until_requeued(cluster, two, 1)
    for job in (one, two):
        assert until_end(cluster, job) == "COMPLETED", log_of(folder, job, "megagpt-data")
    assert shard_bytes(folder / "here") == shard_bytes(folder / "on_1") == shard_bytes(folder / "on_2")
    assert not cluster.rest()


@pytest.mark.long
def test_a_job_that_fails_at_once_is_tried_four_times(cluster, tmp_path):
    folder = checkout(tmp_path / "checkout", Path("nowhere"), steps=8)
    script = folder / "launch" / "slurm" / "pretrain.sbatch"
    script.write_text(script.read_text().replace("python=(.venv/bin/python)", "python=(false)"))
    job = sbatch(cluster, folder, TRAIN)
    for n in (1, 2, 3):
        until_requeued(cluster, job, n)
    assert until_end(cluster, job) == "FAILED"
    assert field(cluster["h1"], job, "Restarts") == "3"
    assert log_of(folder, job).count("failed again after three restarts") == 1


@pytest.mark.long
def test_a_signal_to_the_batch_shell_alone_saves_ends_the_job_and_leaves_nothing(cluster, dataset, tmp_path):
    folder = checkout(tmp_path / "checkout", dataset, steps=60, batch=64)
    job = sbatch(cluster, folder, TRAIN)
    until_step(folder, 25)
    cluster["h1"].run("scancel", "--batch", "--signal=TERM", job)
    assert until_end(cluster, job) != "COMPLETED"
    assert not cluster.rest(60)
    log = log_of(folder, job)
    assert log.count("(SIGTERM) and saved") == 1, log
    again = sbatch(cluster, folder, TRAIN)
    assert until_end(cluster, again) == "COMPLETED", log_of(folder, again)
    assert list(metric(folder / OUT_DIR, "train/loss")) == list(range(1, 61))


@pytest.mark.long
def test_a_run_that_is_cut_in_every_way_ends_to_the_bit_as_one_that_is_not(cluster, dataset, tmp_path):
    """By its time limit, an operator, a more urgent job, a lost node, and scancel; then it is submitted again."""
    straight = checkout(tmp_path / "straight", dataset, steps=200, batch=256)
    undisturbed = sbatch(cluster, straight, TRAIN)
    assert until_end(cluster, undisturbed) == "COMPLETED", log_of(straight, undisturbed)

    cut = checkout(tmp_path / "cut", dataset, steps=200, batch=256)
    job = sbatch(cluster, cut, TRAIN.replace("sbatch", "sbatch --time=1 --signal=USR1@10", 1))
    until_requeued(cluster, job, 1, "TimeLimit=60")
    reached = until_step(cut, last_logged(cut / OUT_DIR / "metrics.jsonl") + 10)

    cluster["h1"].run("scontrol", "requeue", job)
    until_requeued(cluster, job, 2)
    reached = until_step(cut, reached + 10)

    cluster["h1"].run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    until_requeued(cluster, job, 3)
    reached = until_step(cut, reached + 10)

    cluster["h2"].power_off()
    until_requeued(cluster, job, 4)
    cluster.power_on(2)
    until_step(cut, reached + 10)

    cluster["h1"].run("scancel", job)
    assert until_end(cluster, job) == "CANCELLED"
    log = log_of(cut, job)
    assert log.count("(SIGUSR1) and saved") == 1
    assert log.count("(SIGTERM) and saved") == 3  # requeued, pre-empted, canceled
    assert log.count("resuming from") == 4

    again = sbatch(cluster, cut, TRAIN)
    assert until_end(cluster, again) == "COMPLETED", log_of(cut, again)
    assert metric(cut / OUT_DIR, "train/loss") == metric(straight / OUT_DIR, "train/loss")
    assert metric(cut / OUT_DIR, "val/loss") == metric(straight / OUT_DIR, "val/loss")
    assert list(drawn(board(cut / OUT_DIR), "train/loss")) == list(range(1, 201))
    assert list(drawn(board(cut / OUT_DIR), "val/loss")) == list(range(20, 201, 20))


def test_trials_of_a_study_are_slurm_jobs_side_by_side(cluster, dataset, tmp_path):
    folder = checkout(tmp_path, dataset, steps=4)
    (folder / "space.json").write_text('{"optimizer.params.lr": {"choices": [0.001, 0.003, 1e18]}}')
    words = "-m megagpt tune ds_configs/gpt2_124m.json --space space.json --study study --trials 3 --parallel 2"
    more = ["megagpt.every.eval=2", "train_micro_batch_size_per_gpu=8", "tensorboard.enabled=false"]
    command = [sys.executable, *words.split(), "--slurm", "--nodes=1 --partition=all", *more]
    found = cluster["h1"].run(*command, cwd=folder, timeout=300).stdout
    assert f"megagpt train {Path('study', 'best.json')}" in found
    jobs = cluster["h1"].run("scontrol", "--oneliner", "show", "jobs").stdout.splitlines()
    trials = [job for job in jobs if f"WorkDir={folder} " in job]
    assert len(trials) == 3
    assert all("JobState=COMPLETED" in job or "JobState=FAILED" in job for job in trials)  # a rate of 1e18 diverges
    assert sorted(path.name for path in (folder / "study" / "trials").glob("[0-9]*[0-9]")) == ["0000", "0001", "0002"]
