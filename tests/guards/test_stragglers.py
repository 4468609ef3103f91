"""Which host the others wait for. What real ranks that are held up make of it is in test_two_ranks.py."""

import time

import pytest
import torch

from megagpt.guards.stragglers import HOSTS_DRAWN, ForwardTimer, StragglerDetector

HOSTS = ["h1", "h1", "h2", "h2"]


def own(*forward: float, data: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> torch.Tensor:
    """(4, 2) of ten steps, which took six times the usual second of forward passes."""
    return torch.tensor([forward, data]).T


USUAL, SLOW = own(1.0, 1.0, 1.0, 1.0), own(1.0, 1.0, 1.0, 1.4)
LESS_SLOW, HARDLY = own(1.0, 1.0, 1.0, 1.2), own(1.0, 1.0, 1.0, 1.1)
WAITS = own(1.0, 1.0, 1.0, 1.0, data=(0.1, 0.1, 0.8, 0.1))


def said(cluster: StragglerDetector, *windows: torch.Tensor) -> list[str]:
    return [line for window in windows for line in cluster.judge(window, 6.0, 10)]


def test_a_host_is_named_once_when_it_is_slow_for_three_windows_and_once_when_it_no_longer_is():
    cluster = StragglerDetector(HOSTS, forward_waits=False)
    assert said(cluster, SLOW, SLOW) == []
    (line,) = said(cluster, SLOW)
    assert line.startswith(
        "straggler: rank 3 on h2 slows every step: in a step of 0.600 s it takes 0.140 s for its forward passes "
        "(median rank: 0.100 s) and waits 0.000 s for data (median rank: 0.000 s); look there"
    )
    assert cluster.slow == ["h2"]
    assert said(cluster, SLOW, LESS_SLOW, HARDLY, HARDLY, LESS_SLOW, HARDLY, HARDLY) == []
    assert said(cluster, HARDLY) == ["h2 is no longer a straggler"]
    assert cluster.slow == []
    assert len(said(cluster, SLOW, SLOW, SLOW)) == 1


@pytest.mark.parametrize("forward_waits", [False, True])
def test_a_host_that_waits_for_its_data_is_named(forward_waits):
    """0.7 s more than the median in 6 s; 0.6 would be a tenth."""
    (line,) = said(StragglerDetector(HOSTS, forward_waits=forward_waits), WAITS, WAITS, WAITS)
    assert "rank 2 on h2 slows every step: in a step of 0.600 s it " in line
    assert "waits 0.080 s for data (median rank: 0.010 s)" in line
    assert ("forward passes" in line) == (not forward_waits)


def test_forward_passes_that_wait_for_others_name_nobody():
    assert said(StragglerDetector(HOSTS, forward_waits=True), *[SLOW] * 9) == []


@pytest.mark.parametrize("windows", [[SLOW, SLOW, USUAL, SLOW, SLOW], [LESS_SLOW] * 9, [own(2.0, 2.0, 2.0, 2.0)] * 9])
def test_neither_moments_nor_small_differences_are_named(windows):
    assert said(StragglerDetector(HOSTS, forward_waits=False), *windows) == []


@pytest.mark.parametrize(("steps", "seconds"), [(1, 1.0), (4, 0.5)])
def test_few_steps_and_short_ones_are_judged_together(steps, seconds):
    """Ten logs are a window of ten steps, or of five seconds; three windows name the host."""
    cluster = StragglerDetector(HOSTS, forward_waits=False)
    assert [bool(cluster.judge(SLOW, seconds, steps)) for _ in range(30)] == [False] * 29 + [True]


def test_what_is_drawn_of_hosts_and_ranks():
    seconds = own(1.0, 1.2, 1.1, 3.0, data=(0.0, 0.5, 0.2, 0.0))
    data = {
        "cluster/data_seconds_median": 0.0,
        "cluster/data_seconds_slowest": pytest.approx(0.05),
        "cluster/data_slowest_rank": 1.0,
        "cluster/data_seconds/h1": pytest.approx(0.05),
        "cluster/data_seconds/h2": pytest.approx(0.02),
    }
    assert StragglerDetector(HOSTS, forward_waits=True).metrics(seconds, 10) == data
    assert StragglerDetector(HOSTS, forward_waits=False).metrics(seconds, 10) == data | {
        "cluster/forward_seconds_median": pytest.approx(0.11),
        "cluster/forward_seconds_slowest": pytest.approx(0.3),
        "cluster/forward_slowest_rank": 3.0,
        "cluster/forward_seconds/h1": pytest.approx(0.12),
        "cluster/forward_seconds/h2": pytest.approx(0.3),
    }


@pytest.mark.parametrize(("n_hosts", "drawn"), [(1, 0), (HOSTS_DRAWN, 6 + 2 * HOSTS_DRAWN), (HOSTS_DRAWN + 1, 6)])
def test_few_hosts_are_drawn_by_themselves(n_hosts, drawn):
    cluster = StragglerDetector([f"h{n}" for n in range(n_hosts)], forward_waits=False)
    assert len(cluster.metrics(torch.ones(n_hosts, 2), 10)) == drawn


def test_the_clock_takes_each_forward_pass_for_the_median():
    clock = ForwardTimer(torch.device("cpu"))
    for seconds in (0.02, 0.02, 1.0):
        with clock.forward():
            time.sleep(seconds)
    assert 0.06 <= clock.lap() < 1.0
