"""The learning-rate range test (Smith 2017, section 3.3): the rate rises by the same factor in each step.

The loss falls fastest at a rate somewhat below the one from which on it rises.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.config.run_file import RunConfig
from megagpt.errors import UserError
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.terminal import show, typed
from megagpt.tuning.trial import end_with_parent

LOWEST, HIGHEST = 1e-6, 1.0  # rates of the test, of Adam
SMOOTHED = 0.9  # share of the moving average that a step leaves
DIVERGED = 4.0  # nats above the lowest loss
WIDTH, HEIGHT = 64, 12
SHORT_RUN = {  # keys of a run that nobody continues or looks at
    "megagpt.every": {"log": 1, "eval": 0, "save": 0},
    "megagpt.guards.spikes.action": "log",
    "megagpt.early_stopping": {"patience": 0},
    "tensorboard.enabled": False,
    "wandb.enabled": False,
    "megagpt.mlflow.enabled": False,
}


def find_rate(run: RunConfig, run_file: Path, overrides: Sequence[str], *, steps: int) -> None:
    """Run the test, draw it, and print the suggested rate. Raises UserError."""
    peak = run.deepspeed.optimizer.params
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / "range_test"
        keys = {
            "megagpt.out_dir": str(out_dir),
            "megagpt.schedule": {"max_steps": steps, "shape": "range-test", "min_lr_ratio": LOWEST / HIGHEST},
            "optimizer.params.lr": HIGHEST,
            **SHORT_RUN,
        }
        if run.deepspeed.optimizer.type == "Muon":  # both rates rise together
            keys["optimizer.params.muon_lr"] = HIGHEST * peak.of_muon / peak.lr
        options = as_typed(keys)
        command = [sys.executable, "-m", "megagpt", "train", str(run_file), "--nproc", "1", *overrides, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=end_with_parent)
        rows = [row for row in read_rows(out_dir / METRICS) if "train/loss" in row and "optim/lr" in row]
        # A rate of 1 makes numbers that are not finite, which ends the run; then the test is at its end too.
        if len(rows) < steps // 4:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [done.stderr[-300:]]
            raise UserError(f"the range test failed: {said[-1].removeprefix('error: ')}")
    rates = [row["optim/lr"] for row in rows]
    losses = smoothed([math.nan if row["train/loss"] is None else row["train/loss"] for row in rows])
    n = until_divergence(losses)
    best = steepest(rates[:n], losses[:n])
    show(plot(rates[:n], losses[:n], best))
    suggested = f"optimizer.params.lr={rates[best]:.2g}"
    if run.deepspeed.optimizer.type == "Muon":
        suggested += f" optimizer.params.muon_lr={rates[best] * peak.of_muon / peak.lr:.2g}"
    lowest = losses[:n].index(min(losses[:n]))
    show(
        f"the loss falls fastest at {rates[best]:.2g} and is lowest at {rates[lowest]:.2g}; a peak rate to begin with: "
        f"megagpt train {typed(run_file)} {suggested}"
    )


def as_typed(keys: Mapping[str, Any]) -> list[str]:
    """Return keys and their values as they are typed after a run file."""
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def smoothed(losses: list[float]) -> list[float]:
    """Return the moving average of the losses, corrected for its start; NaN from the first loss that is not finite."""
    found, average = [], 0.0
    for i, loss in enumerate(losses):
        average = SMOOTHED * average + (1 - SMOOTHED) * loss
        found.append(average / (1 - SMOOTHED ** (i + 1)))
    return found


def until_divergence(losses: list[float]) -> int:
    """Return how many steps there are before the loss is not finite, or far above the lowest."""
    lowest = math.inf
    for i, loss in enumerate(losses):
        lowest = min(lowest, loss)
        if not loss < lowest + DIVERGED:
            return i
    return len(losses)


def steepest(rates: list[float], losses: list[float]) -> int:
    """Return the index at which the loss falls most for an equal factor of the rate, over a tenth of the test."""
    span = max(1, len(rates) // 10)
    slopes = [losses[i + span] - losses[i] for i in range(len(rates) - span)]
    if not slopes:
        raise UserError("the range test has too few steps; give --find-lr 100 or more")
    return slopes.index(min(slopes)) + span // 2


def plot(rates: list[float], losses: list[float], marked: int) -> str:
    """Draw losses over the logarithm of the rates with letters, and mark one."""
    high, low = losses[0] + 0.1 * (losses[0] - min(losses)), min(losses)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for i, loss in enumerate(losses):
        column = round(i / max(1, len(losses) - 1) * (WIDTH - 1))
        row = round((high - min(high, loss)) / ((high - low) or 1.0) * (HEIGHT - 1))
        grid[row][column] = "*"
    column = round(marked / max(1, len(losses) - 1) * (WIDTH - 1))
    lines = [
        f"{high if i == 0 else low:8.3f} |{''.join(row)}" if i in (0, HEIGHT - 1) else f"         |{''.join(row)}"
        for i, row in enumerate(grid)
    ]
    lines.append("         +" + "-" * WIDTH)
    lines.append("          " + " " * column + "^")
    lines.append(f"          {rates[0]:<10.1e}{'learning rate':^{WIDTH - 20}}{rates[-1]:>10.1e}")
    return "\n".join(lines)
