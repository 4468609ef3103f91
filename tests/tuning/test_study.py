"""Studies of real trials: killed and continued, with trials that break, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from support import DEBUG_RUN, debug_run

from megagpt.__main__ import main
from megagpt.config.run_file import load_run_config
from megagpt.errors import UserError
from megagpt.tuning.space import read_space
from megagpt.tuning.study import Study, overrides

pytestmark = pytest.mark.process
SPACE = {
    "optimizer.params.lr": {"choices": [0.001, 0.003, 1e18]},
    "megagpt.regularization.dropout": {"low": 0.0, "high": 0.2},
}
SHORT = ["megagpt.schedule.max_steps=6", "megagpt.every.eval=2", "tensorboard.enabled=false"]


@pytest.fixture
def tune(dataset, tmp_path):
    """A function that returns the words of a `megagpt tune` command on the debug run file."""
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    data = [f"megagpt.data.{key}={dataset}" for key in ("train.0.path", "val")]

    def words(*more):
        own = ["tune", str(DEBUG_RUN), "--space", str(tmp_path / "space.json")]
        return [*own, "--study", str(tmp_path / "study"), *more, *data, *SHORT]

    return words


def trials_of(study: Path) -> list[FrozenTrial]:
    journal = JournalStorage(JournalFileBackend(str(study / "journal.log")))
    return optuna.load_study(study_name="megagpt", storage=journal).trials


def test_a_killed_study_leaves_no_process_and_continues_to_its_best_run_file(tune, tmp_path, capfd):
    study = tmp_path / "study"
    command = [sys.executable, "-m", "megagpt", *tune("--trials", "3")]
    tuner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = study / "trials" / "0001" / "metrics.jsonl"
    while not (second.exists() and "val/loss" in second.read_text()):
        assert tuner.poll() is None
        time.sleep(0.05)  # a file that another process writes
    children = psutil.Process(tuner.pid).children(recursive=True)
    tuner.kill()
    tuner.wait()
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() for child in children)
    before = trials_of(study)
    assert [trial.state for trial in before][1:] == [TrialState.RUNNING]

    assert main(tune("--trials", "3")) == 0
    out = capfd.readouterr().out
    assert "resuming trial 1, which the study was stopped in" in out
    after = trials_of(study)
    assert len(after) == 3
    assert all(trial.state.is_finished() for trial in after)
    assert after[0].values == before[0].values
    for trial in after:
        broke = "optimizer.params.lr=1e+18" in overrides(trial)
        assert (trial.state == TrialState.FAIL) == broke, trial.user_attrs
        if broke:
            assert "finite" in trial.user_attrs["failure"]
            assert f"trial {trial.number}: failed: " in out or trial.number == 0
    done = [trial for trial in after if trial.state == TrialState.COMPLETE]
    best = min(done, key=lambda trial: trial.values[0])
    assert f"best val/loss {best.values[0]:.4f} of trial {best.number}: megagpt train {study / 'best.json'}" in out
    tuned = load_run_config(study / "best.json")
    assert f"optimizer.params.lr={tuned.deepspeed.optimizer.params.lr}" in overrides(best)
    assert tuned.megagpt.schedule.max_steps == 6
    kept = [path.parent.name for path in (study / "trials").glob("*/checkpoints")]
    assert kept == [f"{best.number:04d}"]
    assert "<svg" in (study / "report.html").read_text()

    assert main(tune("--trials", "3")) == 0  # nothing is left to do
    assert len(trials_of(study)) == 3
    assert main(tune("--trials", "3", "optimizer.params.weight_decay=0.5")) == 2
    assert "was begun with optimizer.params.weight_decay of the run file" in capfd.readouterr().err


def test_ctrl_c_stops_a_study_with_its_trials_saved(tune, tmp_path):
    command = [sys.executable, "-m", "megagpt", *tune("--trials", "9"), "megagpt.schedule.max_steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tuner:
        metrics = tmp_path / "study" / "trials" / "0000" / "metrics.jsonl"
        while not (metrics.exists() and "val/loss" in metrics.read_text()):
            assert tuner.poll() is None, tuner.stdout.read()
            time.sleep(0.05)  # a file that another process writes
        tuner.send_signal(signal.SIGINT)
        out = tuner.communicate()[0]
    assert tuner.returncode == 75, out
    assert "stopped; the same command continues the study" in out
    assert (tmp_path / "study" / "trials" / "0000" / "checkpoints" / "latest").exists()
    assert [trial.state for trial in trials_of(tmp_path / "study")] == [TrialState.RUNNING]


def test_two_tuners_of_one_study_are_one_too_many(dataset, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    run = debug_run(dataset, tmp_path / "run", *SHORT)
    space = read_space(tmp_path / "space.json", lambda options: run.changed(*options))
    first = Study(tmp_path / "study", run, space, 0)
    with pytest.raises(UserError, match=f"is in use by .*{os.getpid()}"):
        Study(tmp_path / "study", run, space, 0)
    drawn = overrides(first.next())
    first.close()
    again = Study(tmp_path / "other", run, space, 0)
    assert overrides(again.next()) == drawn  # the same seed draws the same, in whatever process
    again.close()
    with pytest.raises(UserError, match="was begun with seed 0, and now it is 1"):
        Study(tmp_path / "study", run, space, 1)
