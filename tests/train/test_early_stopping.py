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
from megagpt.train.early_stopping import (
    KEY,
    EarlyStopping,
    after_evaluation,
    after_training,
    at_resume,
    metrics_of,
    restarted,
    way_on,
    why_stopped,
)
from megagpt.train.trainer import train
from megagpt.train_state import TrainState

losses = st.lists(st.floats(0.0, 20.0) | st.just(math.nan), max_size=30)


def run(values, cfg, begin=EarlyStopping(), first=1, tokens=10):  # noqa: B008 (frozen)
    """The state after an evaluation at each step, a step being of ten tokens."""
    return reduce(
        lambda state, item: after_evaluation(state, item[1], item[0], item[0] * tokens, cfg),
        enumerate(values, start=first),
        begin,
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


PATIENCE_IN_TOKENS = [(n, 10 * n) for n in range(1, 5)]


@given(losses, st.integers(0, 30), st.sampled_from(PATIENCE_IN_TOKENS), st.integers(0, 5), st.sampled_from([1, 3]))
def test_patience_in_the_tokens_of_n_evaluations_is_patience_n(values, cut, patience, min_steps, smoothing):
    same = {"min_steps": min_steps, "smoothing": smoothing}
    by_evals = EarlyStoppingConfig(patience=patience[0], **same)
    by_tokens = EarlyStoppingConfig(patience_tokens=patience[1], **same)
    begin = at_resume(EarlyStopping(), by_evals)
    assert run(values, by_tokens, begin) == run(values, by_evals, begin)
    half, first = run(values[:cut], by_evals, begin), len(values[:cut]) + 1
    assert run(values[cut:], by_tokens, at_resume(half, by_tokens), first=first) == run(values, by_tokens, begin)


def test_tokens_count_also_where_evaluations_are_not_equally_far_apart():
    cfg = EarlyStoppingConfig(patience_tokens=70)
    states = [EarlyStopping()]
    for step, tokens_seen in enumerate([30, 50, 90, 119, 120], start=1):
        states.append(after_evaluation(states[-1], float(step > 1), step, tokens_seen, cfg))
    assert [state.bad_tokens for state in states] == [0, 0, 20, 60, 89, 90]
    assert [state.stopped for state in states] == [False, False, False, False, True, True]


@given(losses)
def test_the_best_step_is_that_of_the_lowest_loss_however_stopping_is_smoothed(values):
    raw, smooth = run(values, EarlyStoppingConfig()), run(values, EarlyStoppingConfig(smoothing=3, patience=2))
    assert (raw.best, raw.best_step) == (smooth.best, smooth.best_step)


def test_a_median_of_three_outvotes_one_loss():
    values = [4.0, 3.0, 9.0, 2.5, 1.0, 2.6, 2.7, math.nan, 2.6, 2.8]
    medians = [None, None, 4.0, 3.0, 2.5, 2.5, 2.6, 2.7, 2.7, 2.8]
    states = [run(values[:n], EarlyStoppingConfig(smoothing=3, patience=5)) for n in range(1, 11)]
    assert [metrics_of(state, 1.0).get("val/median_loss") for state in states] == medians
    assert [state.lowest for state in states] == [math.inf, math.inf, 4.0, 3.0, *[2.5] * 6]
    assert [state.bad_evals for state in states] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert [state.stopped for state in states] == [*[False] * 9, True]
    assert (states[-1].best, states[-1].best_step) == (1.0, 5)  # which the median never saw
    why = why_stopped(states[-1], EarlyStoppingConfig(smoothing=3, patience=5))
    assert why == "for 5 evaluations the median of 3 val/loss was not lower than the lowest one, 2.5000"


def gaps(pairs, cfg, begin=EarlyStopping(), first=1):  # noqa: B008 (frozen)
    """The states after evaluations, each after two training steps of the same loss, on all targets and on half."""
    states = [begin]
    for step, (train_loss, val_loss) in enumerate(pairs, start=first):
        state = after_training(states[-1], [(train_loss, 1.0), (train_loss / 2, 0.5), (math.nan, 1.0)], cfg)
        states.append(after_evaluation(state, val_loss, step, 10 * step, cfg))
    return states[1:]


OVERFIT = [(3.0, 3.0), (2.0, 2.75), (2.0, 2.25), (1.0, 2.0), (1.0, math.nan), (0.5, 2.0), (0.25, 1.75)]


@pytest.mark.parametrize(("patience", "stops_at"), [({}, 2), ({"patience": 3}, 7), ({"patience_tokens": 21}, 7)])
def test_a_gap_to_the_training_loss_stops_after_patience(patience, stops_at):
    cfg = EarlyStoppingConfig(max_gap=0.5, **patience)
    states = gaps(OVERFIT, cfg)
    assert [state.gap.last for state in states] == [0.0, 0.75, 0.25, 1.0, 1.0, 1.5, 1.5]
    logged = [metrics_of(state, loss).get("val/train_gap") for state, (_, loss) in zip(states, OVERFIT, strict=True)]
    assert logged == [0.0, 0.75, 0.25, 1.0, None, 1.5, 1.5]  # none where the loss is not finite
    assert [state.gap.evals for state in states] == [0, 1, 0, 1, 1, 2, 3]
    assert [state.stopped for state in states].index(True) == stops_at - 1
    why = why_stopped(states[stops_at - 1], cfg)
    assert why.endswith(
        f" was more than megagpt.early_stopping.max_gap=0.5 above train/loss, at last by "
        f"{states[stops_at - 1].gap.last:.4f}"
    )
    assert why.startswith("for 30 tokens" if "patience_tokens" in patience else "for ")
    assert not any(state.stopped for state in gaps(OVERFIT, EarlyStoppingConfig(max_gap=0.5, min_steps=8, **patience)))
    more = EarlyStoppingConfig(**patience, max_gap=2.0)
    assert not at_resume(states[stops_at - 1], more).stopped
    (line,) = restarted(states[stops_at - 1], more)
    assert line.startswith("note: megagpt.early_stopping.max_gap was 0.5 and is 2: evaluations above it are counted")


@pytest.mark.parametrize("key", ["patience", "patience_tokens"])
def test_the_way_on_of_a_run_with_patience_and_a_gap_leads_on(key):
    """Where no loss improves and the gap is too large, no patience at all would end the run at once."""
    cfg = EarlyStoppingConfig(**{key: 20 if key == "patience_tokens" else 2}, max_gap=0.5)
    state = gaps([(2.0, 2.25), (2.0, 2.25), (1.0, 2.25)], cfg)[-1]
    assert (state.stopped, state.gap.evals) == (True, 1)
    assert at_resume(state, EarlyStoppingConfig(max_gap=0.5)).stopped
    used = {"patience": 2, "patience_tokens": 20}[key]
    assert way_on(state, cfg) == f"set {KEY}.{key} to more than {used}, to train further"
    assert not at_resume(state, cfg.model_copy(update={key: used + 1})).stopped
    off = way_on(state, cfg.model_copy(update={"max_gap": None}))
    assert off.endswith(" for no early stopping, to train further")


@given(
    st.lists(st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0) | st.just(math.nan)), max_size=12), st.integers(0, 12)
)
def test_a_gap_survives_json_in_the_middle_of_the_training_that_it_measures(pairs, cut):
    cfg = EarlyStoppingConfig(max_gap=0.5, patience=2, smoothing=3)
    straight = EarlyStopping()
    resumed = EarlyStopping()
    for step, (train_loss, val_loss) in enumerate(pairs):
        steps = [(train_loss, 1.0), (train_loss / 3, 0.9), (train_loss / 7, 0.3)]
        straight = after_training(straight, steps, cfg)
        resumed = after_training(resumed, steps[:2], cfg)
        if step == cut:
            resumed = at_resume(TrainState.from_json(TrainState(stopper=resumed).as_json()).stopper, cfg)
        resumed = after_training(resumed, steps[2:], cfg)
        straight, resumed = (after_evaluation(one, val_loss, step, step, cfg) for one in (straight, resumed))
    assert resumed == straight


def test_another_smoothing_counts_from_the_resume_on_and_says_so():
    old = EarlyStoppingConfig(patience=3)
    state = run([1.0, 2.0, 2.0], old)
    new = EarlyStoppingConfig(patience=3, smoothing=2)
    (line,) = restarted(state, new)
    assert line == (
        "note: megagpt.early_stopping.smoothing was 1 and is 2: evaluations without an improvement are counted from "
        "this step on"
    )
    assert restarted(state, old) == []
    state = at_resume(state, new)
    assert (state.best, state.bad_evals) == (1.0, 0)
    assert not run([2.0, 2.0, 2.0, 2.0], new, state, first=4).stopped  # the first median, of two, is an improvement
    assert run([2.0, 2.0, 2.0, 2.0, 2.0], new, state, first=4).stopped


def test_a_checkpoint_of_an_older_megagpt_resumes_with_its_count():
    plain = TrainState(step=7, tokens_seen=70, stopper=EarlyStopping(1.0, 5, 2)).as_json()
    plain["stopper"] = {name: plain["stopper"][name] for name in ("best", "best_step", "bad_evals", "stopped")}
    stopper = TrainState.from_json(plain).stopper
    assert (stopper.bad_evals, stopper.evaluated_at) == (2, 70)
    assert run([2.0], EarlyStoppingConfig(patience=3), stopper, first=8).stopped
    assert run([2.0], EarlyStoppingConfig(patience_tokens=10), stopper, first=8).stopped


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


def test_a_loss_far_above_that_of_training_stops_the_run_and_names_the_limit_to_raise(
    dataset, device, tmp_path, capsys
):
    """At such a rate the first update breaks the model: the training loss is that of the weights before it."""
    options = [*EVALS[1:], 'megagpt.every={"log": 0, "eval": 1, "save": 0}', "optimizer.params.lr=1"]

    def again(limit):
        state = train(debug_run(dataset, tmp_path, *options, f"megagpt.early_stopping.max_gap={limit}"), device)
        return state, capsys.readouterr().out

    state, out = again(0.5)
    gap = state.stopper.gap.last
    assert (state.step, state.stopper.stopped) == (1, True)
    assert f"stopped early at step 1: for 1 evaluation val/loss was more than {KEY}.max_gap=0.5 above train/" in out
    assert f"at last by {gap:.4f}\n" in out
    found = curves(tmp_path)
    assert found["val/train_gap"][1] == gap == found["val/loss"][1] - found["train/loss"][1]
    _, out = again(0.5)
    way_out = f"set {KEY}.max_gap to more than {gap:.4f}, or to null for no limit, to train further"
    assert way_out in out
    state, out = again(1e5)
    assert (state.step, state.stopper.stopped) == (5, False)
    assert f"note: {KEY}.max_gap was 0.5 and is 100000: evaluations above it are counted from this step on" in out
