"""A process that may not take more memory: what the user is told, that nothing hangs, and `megagpt plan --probe`."""

import ast
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DEBUG_RUN, PROGRAMS, ROOT, environment, overrides, torchrun

from megagpt.cli.plan.micro_batch_search import Used, bisect
from megagpt.guards.out_of_memory import DOING

LIMITED = PROGRAMS / "memory_limited_rank.py"
WIDE = ["megagpt.model.n_layer=1", "megagpt.model.n_head=1"]


@pytest.mark.process
def test_a_model_that_does_not_fit_is_one_message(dataset, tmp_path):
    """One matrix of it is 3 GiB, and 2 GiB are left."""
    options = overrides(dataset, tmp_path / "run", *WIDE, "megagpt.model.n_embd=16384")
    command = [sys.executable, LIMITED, "--deepspeed_config", DEBUG_RUN, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "out of memory while building the model and its optimizer, on rank 0" in errors[0]
    assert "No setting fits: take more ranks, or a smaller model" in errors[0]


@pytest.mark.process
def test_a_step_that_does_not_fit_on_one_of_two_ranks_ends_both(dataset, tmp_path):
    """Of 4,096 samples, the embeddings alone are 1 GiB."""
    sizes = ["megagpt.model.n_embd=1024", "train_batch_size=8192", "train_micro_batch_size_per_gpu=4096"]
    options = overrides(dataset, tmp_path / "run", *WIDE, *sizes)
    done = torchrun(2, LIMITED, "--deepspeed_config", DEBUG_RUN, *options, timeout=180)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "error: out of memory while training a step, on rank 1, which may use" in errors[0]
    assert "predicted: " in errors[0]
    assert "Set train_micro_batch_size_per_gpu to " in errors[0]


@pytest.mark.process
def test_probe_finds_a_micro_batch_by_real_steps(dataset, tmp_path):
    """A prime number of samples leaves two micro-batches: one sample, or all of them, which need 16 GiB."""
    options = overrides(dataset, tmp_path / "run", *WIDE, "megagpt.model.n_embd=1024", "train_batch_size=4099")
    command = [sys.executable, "-m", "megagpt", "plan", DEBUG_RUN, "--probe", "--memory", "4", *options]
    one = "train_micro_batch_size_per_gpu=1"
    done = subprocess.run([*command, one], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Micro-batch 1 is the largest that divides the global batch of 4099 and fits" in done.stdout
    assert "4099: out of memory" in done.stdout
    assert not (tmp_path / "run").exists()


@given(st.sets(st.integers(1, 100), min_size=1), st.integers(0, 110))
def test_bisecting_finds_the_largest_that_fits(candidates, limit):
    rising = sorted(candidates)
    tries = bisect(rising, lambda n: Used(n, limit) if n <= limit else None)
    assert max((n for n, used in tries.items() if used), default=0) == max((n for n in rising if n <= limit), default=0)
    assert len(tries) <= len(rising).bit_length()


def test_the_functions_that_say_what_was_being_done_exist():
    """They are found in a traceback by name, so a rename would lose the message without a word."""
    defined = {
        node.name
        for path in (ROOT / "megagpt").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert DOING.keys() <= defined
