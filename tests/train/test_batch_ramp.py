"""A global batch that grows over the first steps (schedule.batch_ramp_steps).

That a cut run is a straight one's on two ranks and at every ZeRO stage is in train/test_two_ranks.py; on other ranks,
in engine/test_reshard.py.
"""

import re
from bisect import bisect_left
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEBUG_RUN, debug_run, metric, overrides

from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.run_samples import open_run
from megagpt.config.batch import BatchPlan, check_first_batch
from megagpt.config.doubling import doubling
from megagpt.config.schedule import ScheduleConfig
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file
from megagpt.metrics.step_metrics import mean_length
from megagpt.planner.estimate import micro_batches
from megagpt.train.trainer import train

RAMP = ["megagpt.schedule.batch_ramp_steps=3", "megagpt.schedule.first_batch=4"]
SMALL = ['megagpt.every={"log": 1, "eval": 0, "save": 0}', "megagpt.data.val_tokens=128"]


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 6), st.integers(0, 60), st.integers(0, 300))
def test_what_doubles_is_summed_and_counted_as_one_by_one(steps, first, doublings, step, total):
    """Against the plain definition: 2 ** (step * doublings // steps) times the first, and the last from `steps` on."""
    found, last = doubling(steps, first, first << doublings), first << doublings
    each = [first << (s * doublings // steps) if s < steps else last for s in range(301)]
    totals = [0, *accumulate(each)]
    assert found.at(step) == each[step]
    assert found.total(step) == totals[step]
    assert found.steps_to(total) == bisect_left(totals, total)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_ramp_is_a_run_that_is_resumed_with_twice_the_batch(dataset, device, tmp_path, stage):
    """Three steps of 4 samples, an odd number of micro-batches, then of 8: to the last bit."""
    options = [*SMALL, 'megagpt.schedule={"max_steps": 6}', f"zero_optimization.stage={stage}", "gradient_clipping=0.1"]
    state = train(debug_run(dataset, tmp_path / "ramp", *options, *RAMP), device)
    train(debug_run(dataset, tmp_path / "hand", *options, "train_batch_size=4"), device, stop_at=3)
    assert train(debug_run(dataset, tmp_path / "hand", *options), device) == state
    assert (state.samples_seen, state.tokens_seen) == (3 * 4 + 3 * 8, 64 * (3 * 4 + 3 * 8))
    for name in ("train/loss", "optim/grad_norm", "val/loss"):
        assert metric(tmp_path / "ramp", name) == metric(tmp_path / "hand", name)
    ramp, hand = (load_model(tmp_path / name / "checkpoints" / "latest", device).model for name in ("ramp", "hand"))
    for a, b in zip(ramp.parameters(), hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert open_run(tmp_path / "ramp").mixture.batches == open_run(tmp_path / "hand").mixture.batches


def test_a_budget_in_tokens_or_epochs_counts_the_small_batches(dataset, device, tmp_path):
    """12 samples in the first three steps, and 8 in each later one: 33 samples of 64 tokens are reached in step 6."""
    for length in ('{"max_tokens": 2112}', '{"max_epochs": 0.0325}'):  # of 1,005 samples
        options = [*SMALL, f"megagpt.schedule={length}", *RAMP]
        run = debug_run(dataset, tmp_path / length[2:8], *options)
        assert run.megagpt.schedule.max_steps == 6
        for stop_at in (2, None):  # a resume finds nothing to refuse
            state = train(debug_run(dataset, tmp_path / length[2:8], *options), device, stop_at=stop_at)
        assert (state.step, state.samples_seen) == (6, 36)


def test_another_ramp_may_be_given_when_a_run_is_resumed(dataset, device, tmp_path):
    options = [*SMALL, 'megagpt.schedule={"max_steps": 8}']
    train(debug_run(dataset, tmp_path / "run", *options, *RAMP), device, stop_at=2)
    longer = ["megagpt.schedule.batch_ramp_steps=5", "megagpt.schedule.first_batch=4"]
    train(debug_run(dataset, tmp_path / "run", *options, *longer), device)
    sizes = [len(open_run(tmp_path / "run").mixture.samples_of(step)) for step in range(1, 9)]
    assert sizes == [4] * 5 + [8] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["megagpt.schedule.batch_ramp_steps=4"], "first_batch=null with .*batch_ramp_steps=4: the two belong"),
        (["megagpt.schedule.first_batch=4"], "first_batch=4 with .*batch_ramp_steps=0: the two belong"),
        (
            [*RAMP, "megagpt.schedule.first_batch=16"],
            "first_batch=16 does not double to train_batch_size=8; set .*first_batch to 4$",
        ),
        (
            [*RAMP, "megagpt.schedule.first_batch=3"],
            "first_batch=3 does not double to train_batch_size=8; set .*first_batch to (2|4)$",
        ),
        ([*RAMP, "megagpt.schedule.batch_ramp_steps=21"], "is more than megagpt.schedule.max_steps=20.*set .* to 5"),
    ],
)
def test_a_ramp_that_does_not_reach_the_batch_is_refused_by_training_and_by_lint(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path / "run", *options)
    [found] = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *options])
    assert re.search(message, found.text)


def test_a_first_batch_that_the_ranks_do_not_divide_is_refused_until_the_ramp_is_over(dataset, device, tmp_path):
    options = [*SMALL, *RAMP, "megagpt.schedule.max_steps=6"]
    large = "train_micro_batch_size_per_gpu=8"
    message = (
        r"first_batch=4 makes a batch of 4 in step 1, .*=8 x 1 rank = 8; remove megagpt.schedule.first_batch and "
        r"megagpt.schedule.batch_ramp_steps, or set train_micro_batch_size_per_gpu to 4$"
    )
    with pytest.raises(UserError, match=message):
        train(debug_run(dataset, tmp_path / "run", *options, large), device)
    [found] = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *options, large], ranks=1)
    assert re.search(message, found.text)
    noise = ["megagpt.noise_scale=true", "train_micro_batch_size_per_gpu=4"]
    with pytest.raises(
        UserError, match=r"=4 is all of the batch that megagpt.schedule.first_batch makes in step 1; set .* to 2,"
    ):
        train(debug_run(dataset, tmp_path / "run", *options, *noise), device)
    train(debug_run(dataset, tmp_path / "run", *options), device, stop_at=3)
    assert train(debug_run(dataset, tmp_path / "run", *options, *noise), device, stop_at=4).step == 4
    assert train(debug_run(dataset, tmp_path / "run", *options, large), device).step == 6


def test_a_first_batch_for_groups_of_ranks_is_told_in_groups():
    """3 groups of 2 ranks share 6 samples: 2 each, of which the micro-batch of 4 leaves 2; 12 is 4 for each."""
    schedule, batch = ScheduleConfig(max_steps=9, batch_ramp_steps=3, first_batch=6), BatchPlan(24, 4, 2, 6, 2)
    with pytest.raises(UserError, match=r"=4 x 3 groups = 12; set \S+first_batch to 12, or set \S+_per_gpu to 2$"):
        check_first_batch(schedule, batch)
    check_first_batch(schedule, replace(batch, micro_batch=2, accumulation=4))
    check_first_batch(schedule.model_copy(update={"first_batch": 12}), batch)


def test_plan_takes_micro_batches_that_the_first_batch_is_made_of(dataset, tmp_path, capsys):
    ramp = ["megagpt.schedule.batch_ramp_steps=3", "megagpt.schedule.first_batch=6", "train_batch_size=12"]
    run = debug_run(dataset, tmp_path / "run", *ramp, "train_micro_batch_size_per_gpu=2")
    assert micro_batches(run, 1) == [1, 2, 3, 6]
    options = [*overrides(dataset, tmp_path / "run"), *ramp, "train_micro_batch_size_per_gpu=4"]
    assert main(["plan", str(DEBUG_RUN), "--ranks", "1", *options]) == 2
    assert "first_batch=6 makes a batch of 6 in step 1" in capsys.readouterr().err


def test_the_mean_length_of_rows_is_over_their_tokens():
    """Two steps of 4 samples in rows of 16, then two of 8 in rows of 32: (8 x 16 + 16 x 32) / 24 is 26 2/3."""
    rows, batches = doubling(4, 16, 64), doubling(2, 4, 8)
    assert [rows.at(s) for s in range(4)] == [16, 16, 32, 32]
    assert mean_length(rows, batches, range(4)) == 27
    assert mean_length(rows, batches, range(4, 6)) == 64
