"""How fast a run trains, and when it will end, where batches and rows may grow."""

import torch

from megagpt.config.doubling import Doubling
from megagpt.metrics.step_metrics import speed
from megagpt.train.preflight import RunSetup


def pace(setup: RunSetup, device: torch.device, tokens_per_sec: float, steps: range) -> dict[str, float]:
    """Return the metrics of speed over these steps, whose tokens lay in rows of a mean length that FLOPs depend on."""
    cfg = setup.run.megagpt
    rows = mean_length(cfg.schedule.rows(cfg.seq_len), cfg.schedule.batches(setup.batch.global_batch), steps)
    return speed(setup.run, setup.data.vocab_size, tokens_per_sec, device, rows=rows, compiled=setup.compiled)


def mean_length(rows: Doubling, batches: Doubling, steps: range) -> int:
    """Return the length of the row that a token lies in, on average over the tokens of these steps."""
    return round(sum(rows.at(s) * batches.at(s) for s in steps) / sum(batches.at(s) for s in steps))


def eta_seconds(setup: RunSetup, step: int, seconds: float) -> float:
    """Return the seconds to the last step, at the pace of this start, which has taken `seconds` up to `step`."""
    schedule = setup.run.megagpt.schedule
    batches = schedule.batches(setup.batch.global_batch)
    begin, now, end = map(batches.total, (setup.state.step, step, schedule.max_steps))
    return (end - now) * seconds / (now - begin)
