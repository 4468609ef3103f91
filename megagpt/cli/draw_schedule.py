"""Draw what a run file's schedule makes of its steps, for `megagpt lint --schedule`."""

from collections.abc import Callable, Sequence

from megagpt.config.run_file import RunConfig
from megagpt.terminal import if_encodable
from megagpt.train.lr_schedule import lr_factor, muon_momentum, weight_decay_factor

WIDTH, ROWS = 46, 9  # columns of a curve, rows of the table
BLOCKS, LETTERS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def schedule_lines(run: RunConfig) -> list[str]:
    """Return a curve for each thing that follows the schedule, and a table of some steps: at most 80 columns."""
    schedule, n = run.megagpt.schedule, run.megagpt.schedule.max_steps
    first, last, total = run.tokens(1), run.tokens(n) - run.tokens(n - 1), run.tokens(n)
    tokens = f"{last:,}" if first == last else f"{first:,} to {last:,}"
    curves = _curves(run)
    epochs = f" ({schedule.max_epochs:g} epochs)" if schedule.max_epochs else ""
    lines = [f"schedule: {n:,} steps of {tokens} tokens, {total:,} in all{epochs}; shape {schedule.shape}"]
    steps = [round(i * (n - 1) / (WIDTH - 1)) for i in range(WIDTH)] if n >= WIDTH else list(range(n))
    for name, value in curves.items():
        lines.append(f"  {name:<12} {_curve([value(step) for step in steps])}")
    lines.append("  " + f"{'step':>10} {'tokens':>16}" + "".join(f" {name:>12}" for name in curves))
    for step in sorted({round(i * (n - 1) / (ROWS - 1)) for i in range(ROWS)}):
        cells = "".join(f" {_written(value(step)):>12}" for value in curves.values())
        lines.append("  " + f"{step + 1:>10,} {run.tokens(step + 1):>16,}" + cells)
    return lines


def _curves(run: RunConfig) -> dict[str, Callable[[int], float]]:
    """Return what the schedule changes, by its name, as functions of an update's number (0-based)."""
    schedule, params = run.megagpt.schedule, run.deepspeed.optimizer.params
    rows, batches = schedule.rows(run.megagpt.seq_len), schedule.batches(run.deepspeed.train_batch_size)
    found: dict[str, Callable[[int], float]] = {"lr": lambda step: params.lr * lr_factor(step, schedule)}
    if run.deepspeed.optimizer.type == "Muon":
        found["muon_lr"] = lambda step: params.of_muon * lr_factor(step, schedule)
        if schedule.momentum_warmup_steps:
            found["momentum"] = lambda step: muon_momentum(step, params.momentum, schedule)
    if schedule.batch_ramp_steps:
        found["batch"] = batches.at
    if schedule.seq_len_warmup_steps:
        found["seq_len"] = lambda step: rows.at(step)
    if schedule.weight_decay_shape != "constant" and params.weight_decay:
        found["weight_decay"] = lambda step: params.weight_decay * weight_decay_factor(step, schedule)
    return found


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _curve(values: Sequence[float]) -> str:
    """Draw values from 0 to the highest one, a letter each."""
    letters = if_encodable(BLOCKS, LETTERS)
    highest = max(values) or 1.0
    return "".join(letters[round(value / highest * (len(letters) - 1))] for value in values)
