"""Ranks that torchrun starts again: a killed rank costs the steps since the last save, and no more than a minute."""

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support import DEBUG_RUN, ROOT, environment, metric, overrides

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
OPTIONS = ["megagpt.schedule.max_steps=100000", *(f"megagpt.every.{what}=0" for what in ("eval", "sample"))]
OPTIONS += ["megagpt.every.save=5", "megagpt.every.log=1"]


def next_line(launcher: subprocess.Popen[str], *beginnings: str) -> str:
    """Wait for a line that begins with one of these."""
    assert launcher.stdout is not None
    return next(line for line in launcher.stdout if line.startswith(beginnings))


def end(launcher: subprocess.Popen[str]) -> None:
    """Stop the ranks as torchrun does, or kill what is left of a test that failed."""
    below = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
    launcher.send_signal(signal.SIGTERM)
    try:
        launcher.communicate(timeout=120)
    finally:
        launcher.kill()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def kill_and_resume(dataset: Path, out_dir: Path, *, victim: int, at_step: int) -> float:
    """Kill one rank of two after a step, and stop the run a step after it resumed. Returns the seconds in between."""
    run = ["--deepspeed_config", DEBUG_RUN, *overrides(dataset, out_dir, *OPTIONS)]
    command = list(map(str, [sys.executable, *LAUNCH, ROOT / "launch" / "pretrain.py", *run]))
    with out_dir.with_suffix(".log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=log)
    try:
        next_line(launcher, f"step {at_step:>6}/")
        ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(launcher.pid).children()}
        ranks[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        resumed = next_line(launcher, "resuming from", "no checkpoint in")
        next_line(launcher, "step ")
        seconds = time.monotonic() - killed
    finally:
        end(launcher)
    assert resumed.startswith("resuming from") or at_step < 10
    steps = sorted(metric(out_dir, "loss/train"))
    assert steps == list(range(1, len(steps) + 1))
    return seconds


@pytest.mark.process
def test_a_killed_rank_costs_a_restart_by_torchrun(dataset, tmp_path):
    kill_and_resume(dataset, tmp_path / "run", victim=1, at_step=10)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_ten_of_ten_killed_ranks_cost_a_restart_by_torchrun(dataset, tmp_path, seed):
    rng = random.Random(seed)
    victim, at_step = rng.randrange(2), rng.randrange(1, 60)
    assert kill_and_resume(dataset, tmp_path / "run", victim=victim, at_step=at_step) < 60
