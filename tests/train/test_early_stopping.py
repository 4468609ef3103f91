import json
import math
from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.schema import EarlyStoppingConfig
from megagpt.train.early_stopping import EarlyStopping, after_evaluation
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
