"""The benchmark against other trainers: all compute the same thing, and its tables say what was measured."""

import os
import subprocess
import sys

import pytest
import torch
from gpu_suite import PROGRAMS, ROWS, Clock, render
from plain_gpt2 import PlainGPT2
from support import ROOT, environment
from throughput import parse, spec_of
from throughput_table import summary
from turns import our_model, run_of

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.engine.deepspeed_config import check_deepspeed_keys, effective_config
from megagpt.model.loss import next_token_loss


def setting(*more: str):
    return parse(
        [
            "--device",
            "cpu",
            "--model",
            "tiny",
            "--vocab-size",
            "300",
            "--seq",
            "32",
            "--micro-batch",
            "2",
            "--tokens-per-step",
            "128",
            "--steps",
            "2",
            *more,
        ]
    )


def test_all_models_have_the_same_initial_loss(tmp_path):
    from hf_peers import hf_model

    spec = spec_of("ours", setting(), tmp_path)
    rows = torch.randint(3, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    x, y = rows[:, :-1], rows[:, 1:]
    ours = our_model(spec)
    plain = PlainGPT2(ModelConfig(**spec.model), 384)
    plain.load_state_dict(ours.state_dict())
    wanted = next_token_loss(ours(x), y).item()
    assert plain(x, y).item() == pytest.approx(wanted, abs=1e-5)
    assert hf_model(spec)(input_ids=x, labels=y, shift_labels=y.contiguous()).loss.item() == pytest.approx(
        wanted, abs=1e-5
    )


def test_ratios_are_taken_within_a_round():
    """The machine was half as fast in the second round, and the contestants as far apart as in the first."""

    def turn(seconds, loss=3.0, **more):
        return {"steps": 2, "seconds": seconds, "loss": loss, "memory_gib": 1.0, "start_seconds": 5.0, **more}

    matmul = {"flops_per_sec": {"shape": 1e9}, "clocks": ""}
    turns = {
        "ours": [turn(1.0), turn(2.0)],
        "plain": [turn(1.5), turn(3.0, loss=3.03)],
        "hf": "failed: no memory",
        "matmul": [turn(0.1, **matmul), turn(0.2, **matmul)],
    }
    rows = summary(vars(setting("--peers", "ours", "plain", "hf")), turns)["contestants"]
    assert rows["plain"]["reference_over_this_of_turns"] == [1.5, 1.5]
    assert rows["ours"]["tokens_per_sec_of_turns"] == [256.0, 128.0]
    assert (rows["ours"]["loss_agrees"], rows["plain"]["loss_agrees"]) == (True, False)
    assert rows["hf"] == {"failed": "failed: no memory"}


def test_a_row_without_figures_is_not_measured(tmp_path):
    (tmp_path / "350M.failed").write_text("longer than a call\n")
    text = render(tmp_path)
    assert text.count("not measured") == len(ROWS)
    assert "not measured (longer than a call)" in text


@pytest.mark.process
def test_the_time_of_a_killed_call_counts(tmp_path):
    """The next call goes on from the seconds that the file had when the first was killed."""
    file = tmp_path / "spent.json"
    program = (
        "import sys, time; from pathlib import Path; from gpu_suite import Clock\n"
        "clock = Clock(Path(sys.argv[1]))\n"
        "while clock.kept < 1.0: time.sleep(0.05)\n"
        "print('kept', flush=True); time.sleep(60)"
    )
    env = environment() | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")])
    }
    command = [sys.executable, "-c", program, file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "kept\n"
        process.kill()
    assert Clock(file).before >= 1.0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_of_the_gpu_table_is_a_command_that_can_be_run(row, monkeypatch, tmp_path):
    """On one GPU, with the contestants that it names; within one call."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert PROGRAMS[row.program].parse(row.arguments("cpu")).device == "cpu"
    args = PROGRAMS[row.program].parse(row.arguments("cuda"))
    for peer in (peer for peer in getattr(args, "peers", []) if peer.startswith("ours")):
        run = run_of(spec_of(peer, args, tmp_path))
        check_deepspeed_keys(effective_config(run, batch_plan(run.deepspeed, 1), 50304, torch.device("cuda")))
    assert row.estimate <= 9 * 60
