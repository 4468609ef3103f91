"""GPUs of `megagpt plan`: by name, by memory and peak, and without bf16."""

import shlex
from pathlib import Path

import pytest
from support import ROOT

from megagpt.__main__ import main
from megagpt.config.run_file import load_run_config
from megagpt.lint.linter import lint_or_raise
from megagpt.planner.estimate import machine, setting, settings
from megagpt.planner.gpu_specs import GPUS, gpu_named


def test_memory_and_peak_say_as_much_as_a_name():
    run = load_run_config(ROOT / "ds_configs" / "gpt2_124m.json")
    named, given = machine("RTX 4090", 1, None), machine(None, 1, None, gib=23, tflops=165)
    for one, other in zip(settings(run, named, 50304), settings(run, given, 50304), strict=True):
        assert (one.fits, one.memory, one.traffic) == (other.fits, other.memory, other.traffic)
        assert one.seconds == pytest.approx(other.seconds, rel=0.1)  # the memory's bandwidth is a guess
    larger = machine("RTX 4060 Ti", 1, None, gib=15)
    assert (larger.gpu.memory_gib, larger.gpu.peak_flops) == (15, 44e12)


@pytest.mark.parametrize("gpu", ["T4", "V100", "RTX 2080 Ti"])
def test_a_gpu_without_bf16_is_planned_in_fp16_by_keys_that_training_takes(gpu, capsys):
    run_file = str(ROOT / "ds_configs" / "gpt2_124m.json")
    assert main(["plan", run_file, "--gpu", gpu, "zero_optimization.stage=0"]) == 0
    text = capsys.readouterr().out
    assert f"{gpu} has no bf16: planned in fp16, with bf16.enabled=false fp16.enabled=true" in " ".join(text.split())
    keys = shlex.split(text.partition(" in all:\n")[2].partition("\n\n")[0].replace("\\\n", ""))
    run = load_run_config(Path(run_file), ["zero_optimization.stage=0", *keys])
    lint_or_raise(run)
    assert run.deepspeed.dtype == "fp16"
    assert setting(run, machine(gpu, 1, None), 50304).fits


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 SUPER"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("RTX4070TiSuper", "RTX 4070 Ti SUPER"),
        ("rtx3060", "RTX 3060"),
        ("3060", "RTX 3060"),
        ("a6000", "RTX A6000"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("rtx", None),
    ],
)
def test_names_of_torch_and_of_people_lead_to_one_gpu(name, known):
    assert gpu_named(name) == known


def test_every_known_gpu_is_found_by_its_own_name():
    assert [name for name in GPUS if gpu_named(name) != name] == []
    assert [name for name in GPUS if gpu_named(f"NVIDIA {name.upper()}") != name] == []
