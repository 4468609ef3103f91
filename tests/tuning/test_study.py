"""Studies of real trials: killed and continued, with trials that break, and what is refused."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from support import DEBUG_RUN, debug_run

from megagpt.__main__ import main
from megagpt.cli.tune import _places
from megagpt.config.run_file import load_run_config
from megagpt.errors import UserError
from megagpt.file_lock import LOCK, FileLock
from megagpt.tuning import run_trials
from megagpt.tuning.run_trials import LOOK_SECONDS, OVER, _Waiting
from megagpt.tuning.space import read_space
from megagpt.tuning.study import Study, overrides
from megagpt.tuning.trial import wait_until_free

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


def test_values_that_are_no_run_file_together_are_told_and_not_started(tune, tmp_path, capfd):
    sizes = {"megagpt.model.n_embd": {"choices": [64, 96]}, "megagpt.model.n_head": {"choices": [3, 4]}}
    (tmp_path / "space.json").write_text(json.dumps(sizes))
    with patch.object(run_trials, "TrialProcess", side_effect=AssertionError("started")):
        assert main(tune("--trials", "9", "train_batch_size=9")) == 2
    told = capfd.readouterr()
    assert "the first 5 trials failed" in told.err
    assert "trial 0: not started: train_batch_size=9 is not a multiple of" in told.out
    assert {trial.state for trial in trials_of(tmp_path / "study")} == {TrialState.PRUNED}


def test_data_that_no_trial_could_train_on_is_told_before_any_starts(tune, tmp_path, capfd):
    assert main([*tune(), f"megagpt.data.val={tmp_path / 'gone'}"]) == 2
    assert f"there is no dataset folder {tmp_path / 'gone'}" in capfd.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hostfile", "{hosts}", "--slurm", "-p gpu"], "--hostfile reaches hosts by ssh, and --slurm by srun"),
        (["--hostfile", "{hosts}", "--parallel", "2"], "leave --parallel 2 out"),
        (["--hostfile", "{hosts}"], "'h1 slots=0' is not `NAME slots=N`"),
        (["--hostfile", "gone"], "the hostfile gone cannot be read"),
        (["--find-lr", "50"], "--space is of a study, and --find-lr makes one short run"),
    ],
)
def test_options_that_contradict_each_other_and_wrong_hostfiles_are_one_message(tune, tmp_path, capfd, options, told):
    (tmp_path / "hosts").write_text("h1 slots=0\n")
    assert main(tune(*(option.format(hosts=tmp_path / "hosts") for option in options))) == 2
    [message] = capfd.readouterr().err.splitlines()
    assert told in message
    assert not (tmp_path / "study").exists()


def test_a_record_that_was_cut_in_a_line_is_read_up_to_it(dataset, tmp_path, capfd):
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    run = debug_run(dataset, tmp_path / "run", *SHORT)
    space = read_space(tmp_path / "space.json", lambda options: run.changed(*options))
    study = Study(tmp_path / "study", run, space, 0)
    drawn = overrides(study.next())
    study.close()
    journal = tmp_path / "study" / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":5,"wor')
    study = Study(tmp_path / "study", run, space, 0)
    assert "its last line was not written to its end" in capfd.readouterr().out
    study.next()
    study.close()
    assert overrides(trials_of(tmp_path / "study")[0]) == drawn
    assert len(trials_of(tmp_path / "study")) == 2
    journal.unlink()
    with pytest.raises(UserError, match="has trials without its journal"):
        Study(tmp_path / "study", run, space, 0)


def test_a_trial_that_still_saves_after_its_tuner_was_killed_is_waited_for(tmp_path):
    wait_until_free(tmp_path, 0.0)
    assert not (tmp_path / LOCK).exists()
    lock = FileLock(tmp_path / LOCK)
    lock.take()
    with pytest.raises(UserError, match=f"still in use by .*{os.getpid()}"):
        wait_until_free(tmp_path, 0.0)
    lock.release()
    wait_until_free(tmp_path, 0.0)


def test_a_trial_of_a_lost_host_waits_until_it_has_ended_there_and_not_for_ever(tmp_path, capfd):
    lock = FileLock(tmp_path / LOCK)
    lock.take()
    waiting = _Waiting(optuna.create_study().ask(), tmp_path, queued=100.0)
    assert not any(waiting.is_free(100.0 + seconds) for seconds in (0, LOOK_SECONDS, OVER - 1))
    assert capfd.readouterr().out.count("trial 0 waits: its folder is still in use by process ") == 1
    with pytest.raises(UserError, match=f"still in use by .*{os.getpid()}.*lost host left; stop it"):
        waiting.is_free(100.0 + OVER + LOOK_SECONDS)
    lock.release()
    assert not waiting.is_free(100.0 + OVER + LOOK_SECONDS + 1)  # it looked a second before
    assert waiting.is_free(100.0 + OVER + 2 * LOOK_SECONDS)


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


def test_trials_side_by_side_get_the_gpus_that_the_user_left_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    args = argparse.Namespace(parallel=2, slurm=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place.environment for place in _places(args)] == [{"CUDA_VISIBLE_DEVICES": name} for name in ("5", "7")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in _places(args)] == ["0", "1"]
    with pytest.raises(UserError, match="--parallel 3 is more than this machine's 2 GPUs; give 2 or less"):
        _places(argparse.Namespace(parallel=3, slurm=None))
