"""The learning-rate range test: its arithmetic, and that its run ends with it."""

import math
import subprocess
import sys
import time

import psutil
import pytest
from support import DEBUG_RUN

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


@pytest.mark.process
def test_a_killed_range_test_leaves_no_run(dataset):
    data = [f"megagpt.data.{key}={dataset}" for key in ("train.0.path", "val")]
    command = [sys.executable, "-m", "megagpt", "tune", str(DEBUG_RUN), *data, "--find-lr", "1000000"]
    tuner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (runs := [run for run in psutil.Process(tuner.pid).children() if "train" in run.cmdline()]):
        assert tuner.poll() is None
        time.sleep(0.02)  # a process that another one starts
    tuner.kill()
    tuner.wait()
    _, left = psutil.wait_procs(runs, timeout=30)
    for run in left:
        run.kill()
    assert not left
