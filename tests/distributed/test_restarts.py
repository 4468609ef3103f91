"""Ranks that torchrun starts again: a killed rank costs the steps since the last save, and no more than a minute."""

import queue
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import pytest
from support import DEBUG_RUN, ROOT, environment, metric, overrides

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
OPTIONS = ["megagpt.schedule.max_steps=100000", *(f"megagpt.every.{what}=0" for what in ("eval", "sample"))]
OPTIONS += ["megagpt.every.save=5", "megagpt.every.log=1"]
START_SECONDS = 200.0  # a start that takes longer hangs


class Lines:
    """What a program writes, read by a thread, so that waiting for it can end."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=[program.stdout], daemon=True).start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line)
        self._lines.put("")

    def until(self, *beginnings: str, seconds: float) -> str:
        """Wait for a line that begins with one of these. Fails at the end of the output or of the time."""
        deadline = time.monotonic() + seconds
        while not (line := self._lines.get(timeout=max(0.0, deadline - time.monotonic()))).startswith(beginnings):
            assert line, f"ended without {beginnings}"
        return line


def end(launcher: subprocess.Popen[str]) -> None:
    """Stop the ranks as torchrun does, or kill what is left of a test that failed."""
    below = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
    launcher.send_signal(signal.SIGTERM)
    try:
        launcher.wait(120)
    finally:
        launcher.kill()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def kill_and_resume(dataset: Path, out_dir: Path, *, victim: int, at_step: int) -> float:
    """Kill one rank of two after a step, and stop the run a step after it resumed. Returns the seconds in between."""
    run = ["--fresh", "--deepspeed_config", DEBUG_RUN, *overrides(dataset, out_dir, *OPTIONS)]
    command = list(map(str, [sys.executable, *LAUNCH, ROOT / "launch" / "pretrain.py", *run]))
    with out_dir.with_suffix(".log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=log)
    try:
        lines = Lines(launcher)
        lines.until(f"step {at_step:>6}/", seconds=START_SECONDS)
        ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(launcher.pid).children()}
        ranks[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        resumed = lines.until("resuming from", "no checkpoint in", seconds=START_SECONDS)
        lines.until("step ", seconds=START_SECONDS)
        seconds = time.monotonic() - killed
    finally:
        end(launcher)
    assert resumed.startswith("resuming from") or at_step < 10
    assert not out_dir.with_name(f"{out_dir.name}.old1").exists()
    steps = sorted(metric(out_dir, "train/loss"))
    assert steps == list(range(1, len(steps) + 1))
    return seconds


@pytest.mark.process
def test_a_killed_rank_costs_a_restart_by_torchrun(dataset, tmp_path):
    assert kill_and_resume(dataset, tmp_path / "run", victim=1, at_step=10) < 60


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_ten_of_ten_killed_ranks_cost_a_restart_by_torchrun(dataset, tmp_path, seed):
    rng = random.Random(seed)
    victim, at_step = rng.randrange(2), rng.randrange(1, 60)
    assert kill_and_resume(dataset, tmp_path / "run", victim=victim, at_step=at_step) < 60
