"""The arithmetic of the learning-rate range test."""

import math

import pytest

from megagpt.config.schedule import ScheduleConfig
from megagpt.train.lr_schedule import lr_factor
from megagpt.tuning.rate_test import plot, smoothed, steepest, until_divergence


def test_the_rate_rises_by_the_same_factor_in_each_step_up_to_the_peak():
    cfg = ScheduleConfig(max_steps=5, shape="range-test", min_lr_ratio=1e-4)
    assert [lr_factor(step, cfg) for step in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_a_constant_loss_stays_as_it_is_from_the_first_step_and_a_broken_one_ends_the_test():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert until_divergence(smoothed([3.0, 3.0, math.nan, 3.0])) == 2
    assert until_divergence([3.0, 2.0, 5.9, 6.1, 2.0]) == 3
    assert until_divergence([3.0, 2.0]) == 2


def test_the_loss_falls_fastest_where_it_does():
    rates = [10 ** (-6 + i / 20) for i in range(100)]
    losses = [5.0] * 50 + [5.0 - 0.1 * i for i in range(20)] + [3.0] * 30
    found = steepest(rates, losses)
    assert 50 <= found <= 65
    lines = plot(rates, losses, found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("   5.200")
    assert lines[11].startswith("   3.000")
    assert lines[0].count("*") == 0
    assert lines[11].count("*") > 10
