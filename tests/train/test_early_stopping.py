import json
import math
import re
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import curves, debug_run

from megagpt.cli.checkpoints import checkpoint_table
from megagpt.config.regularization import EarlyStoppingConfig
from megagpt.train.early_stopping import EarlyStopping, after_evaluation, at_resume
from megagpt.train.trainer import train
from megagpt.train_state import TrainState

losses = st.lists(st.floats(0.0, 20.0) | st.just(math.nan), max_size=30)


def run(values, cfg, begin=EarlyStopping(), first=1):  # noqa: B008 (frozen)
    return reduce(
        lambda state, item: after_evaluation(state, item[1], item[0], cfg), enumerate(values, start=first), begin
    )


def test_it_stops_after_patience_evaluations_without_improvement():
    cfg = EarlyStoppingConfig(patience=2, min_delta=0.1)
    states = [run([3.0, 2.0, 1.95, 2.5][:n], cfg) for n in range(1, 5)]
    assert [s.bad_evals for s in states] == [0, 0, 1, 2]
    assert [s.stopped for s in states] == [False, False, False, True]
    assert (states[-1].best, states[-1].best_step) == (2.0, 2)


def test_before_min_steps_no_patience_is_used_up():
    cfg = EarlyStoppingConfig(patience=1, min_steps=3)
    assert not run([1.0, 2.0], cfg).stopped
    assert run([1.0, 2.0, 2.0], cfg).stopped


@given(losses)
def test_without_patience_it_never_stops(values):
    assert not run(values, EarlyStoppingConfig(patience=0)).stopped


@given(losses, st.integers(0, 30), st.integers(1, 4))
def test_stopping_and_going_on_from_json_changes_nothing(values, cut, patience):
    cfg = EarlyStoppingConfig(patience=patience)
    half = run(values[:cut], cfg)
    restored = TrainState.from_json(TrainState(stopper=half).as_json()).stopper
    assert run(values[cut:], cfg, restored, first=len(values[:cut]) + 1) == run(values, cfg)


def test_what_a_resumed_run_needs_is_under_a_kilobyte():
    stopper = EarlyStopping(best=1 / 3, best_step=10**12, bad_evals=10**6)
    state = TrainState(step=10**12, samples_seen=10**15, tokens_seen=10**18, val_loss=1 / 3, stopper=stopper)
    assert len(json.dumps(state.as_json())) < 1000


@given(losses)
def test_best_is_the_lowest_loss(values):
    finite = [v for v in values if not math.isnan(v)]
    assert run(values, EarlyStoppingConfig()).best == min(finite, default=math.inf)


@given(losses, st.integers(1, 4), st.integers(0, 8))
def test_a_stopped_run_with_more_patience_is_one_that_had_it_from_the_start(values, patience, more):
    states = [run(values[:n], EarlyStoppingConfig(patience=patience)) for n in range(len(values) + 1)]
    end = next((n for n, state in enumerate(states) if state.stopped), len(values))
    later = EarlyStoppingConfig(patience=patience + more if more else 0)
    resumed = run(values[end:], later, at_resume(states[end], later), first=end + 1)
    if more or not states[end].stopped:
        assert resumed.best == run(values, later).best
        assert resumed.bad_evals == (run(values, later).bad_evals if more else resumed.bad_evals)
    assert at_resume(states[end], EarlyStoppingConfig(patience=patience)) == states[end]


EVALS = [
    'megagpt.every={"log": 1, "eval": 1, "save": 0}',
    "megagpt.data.val_tokens=128",
    'megagpt.schedule={"max_steps": 5}',
]
UNREACHABLE = "megagpt.early_stopping.min_delta=100"  # nats: no later evaluation is that much better


@pytest.fixture(scope="module")
def stopped(dataset, device, tmp_path_factory):
    """The folder of a run that stopped early at step 3, although its loss fell."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(debug_run(dataset, folder, *EVALS, UNREACHABLE, "megagpt.early_stopping.patience=2"), device)
    return folder


def test_a_run_stopped_early_continues_as_its_message_says_and_equals_one_that_was_patient(
    dataset, device, stopped, tmp_path, capsys
):

    def again(folder, *options):
        state = train(debug_run(dataset, folder, *EVALS, UNREACHABLE, *options), device)
        return state, capsys.readouterr().out

    state, out = again(stopped, "megagpt.early_stopping.patience=2")
    assert state.step == 3
    told = "already stopped early at step 3: for 2 evaluations val/loss was not lower by "
    assert out.startswith(told + "megagpt.early_stopping.min_delta=100 than the ")
    assert "val/loss\n" not in out  # no curve, as if it had just been trained
    key, bound = re.search(r"set (\S+) to more than (\d+), or to 0 for no early stopping", out).groups()
    state, out = again(stopped, f"{key}={int(bound) + 1}")
    assert (state.step, state.stopper.bad_evals, state.stopper.stopped) == (4, 3, True)
    assert "stopped early at step 4: for 3 evaluations" in out
    patient, _ = again(tmp_path / "patient", f"{key}={int(bound) + 1}")
    assert patient == state
    assert curves(stopped)["train/loss"] == curves(tmp_path / "patient")["train/loss"]

    state, out = again(stopped, f"{key}=0")
    assert (state.step, state.stopper.stopped) == (5, False)
    assert "finished at step 5" in out
    state, out = again(stopped, f"{key}=0")
    assert out.startswith("already finished at step 5, and megagpt.schedule.max_steps=5; raise megagpt.schedule.max_")


def test_what_counts_as_best_is_told_with_its_rule(dataset, device, tmp_path, capsys):
    options = [*EVALS, "megagpt.early_stopping.patience=1"]
    train(debug_run(dataset, tmp_path / "a", *options, UNREACHABLE), device)
    out = capsys.readouterr().out
    assert "stopped early at step 2: for 1 evaluation val/loss was not lower by megagpt.early_stopping.min_d" in out
    assert re.search(
        r"best val/loss (\S+) at step 1; the \S+ of step 2 does not count, as it was not lower by "
        r"megagpt.early_stopping.min_delta=100\nbest checkpoint: \S+step_00000001\n",
        out,
    )
    table, _ = checkpoint_table(tmp_path / "a", hashes=False)
    assert "\nbest: no later val/loss was lower by megagpt.early_stopping.min_delta\n" in table

    train(debug_run(dataset, tmp_path / "b", *EVALS, "megagpt.schedule.max_steps=2"), device)
    ending = r"best val/loss \S+ at step 2\nbest checkpoint: \S+\ntry it: megagpt generate \S+/b --prompt"
    assert re.search(ending, capsys.readouterr().out)
    table, _ = checkpoint_table(tmp_path / "b", hashes=False)
    assert "\nbest: the lowest val/loss of these steps\n" in table
