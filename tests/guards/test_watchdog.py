"""Runs that hang end, on every rank, and say where; what is only slow or suspended goes on."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import DEBUG_RUN, PROGRAMS, ROOT, environment, overrides, torchrun

HANGING_RANK = PROGRAMS / "hanging_rank.py"


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in part for part in p.info["cmdline"] or [])]


@pytest.mark.process
@pytest.mark.parametrize("how", ["waits", "reduces what no other rank does"])
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_both(dataset, tmp_path, how):
    """The evaluation after step 3 takes longer than the timeout, and is none of its business."""
    done = torchrun(2, HANGING_RANK, how, dataset, tmp_path / "run", timeout=200)
    assert done.returncode != 0
    stacks = [(tmp_path / f"run/stacks.{r}.txt").read_text() for r in range(2)]
    for r in range(2):
        assert f"error: hang: rank {r} reached no step boundary" in done.stderr
        assert re.match(rf"rank {r}, process \d+, \d+ s after step 4:\n", stacks[r])
        assert stacks[r].count("hread 0x") >= 3  # this one, the one that reads ahead, and the main one
    assert "hanging_rank.py" in stacks[1]
    assert "all_reduce" in stacks[0]  # to which rank 1 does not come
    assert not processes_of(tmp_path)


@pytest.mark.process
@pytest.mark.long
def test_a_rank_that_is_stopped_ends_the_run_with_the_stacks_of_the_other(dataset, tmp_path):
    """It can write nothing itself; the launcher kills it, after the half minute that it has to end by itself."""
    done = torchrun(2, HANGING_RANK, "is stopped", dataset, tmp_path / "run", timeout=200)
    assert done.returncode != 0
    assert "all_reduce" in (tmp_path / "run/stacks.0.txt").read_text()
    assert not (tmp_path / "run/stacks.1.txt").exists()
    assert not processes_of(tmp_path)


@pytest.mark.process
def test_a_run_that_was_suspended_goes_on(dataset, tmp_path):
    options = overrides(dataset, tmp_path / "run", "megagpt.guards.hang_timeout=4", "megagpt.schedule.max_steps=200")
    command = [sys.executable, "launch/pretrain.py", "--deepspeed_config", DEBUG_RUN, *options]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step"):
            break
    run.send_signal(signal.SIGSTOP)
    time.sleep(10)  # the suspension itself, longer than the timeout and all ticks
    run.send_signal(signal.SIGCONT)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    assert "finished at step 200" in out
    assert not list((tmp_path / "run").glob("stacks.*"))
