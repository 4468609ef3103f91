"""Runs without a fault on two real gloo ranks, 600 steps each; test_guards.py looks what was said."""

from pathlib import Path
from typing import Any

from support import debug_run, metric, run_scenarios

from megagpt.distributed.process_group import init_process_group
from megagpt.guards import memory_growth
from megagpt.train.trainer import train

DEVICE = init_process_group()
memory_growth.WINDOW = 100  # steps, so that memory has its four whole windows
SEEDS = range(20, 40)  # that the rule of spikes was not made with
EACH = ["megagpt.schedule.max_steps=600", "megagpt.every.sample=0", "optimizer.params.lr=0.001"]
EACH += ["megagpt.every.eval=100", "megagpt.every.save=100", "megagpt.data.val_tokens=256", "tensorboard.enabled=false"]
EACH += ["megagpt.guards.compare_every=10", "megagpt.guards.hang_timeout=30", "megagpt.guards.memory_growth_mib=25.6"]


def clean_runs(dataset: Path, folder: Path) -> dict[int, Any]:
    found = {}
    for seed in SEEDS:
        options = [f"megagpt.seed={seed}", f"megagpt.data.seed={seed}", f"zero_optimization.stage={seed % 4}"]
        health = train(debug_run(dataset, folder / str(seed), *EACH, *options), DEVICE).health
        logged = len(metric(folder / str(seed), "train/loss"))
        found[seed] = logged, health.spikes, health.skipped_steps, health.bad_in_a_row
    return found


if __name__ == "__main__":
    run_scenarios([clean_runs])
