"""How fast a run trains, and when it will end, where batches and rows may grow."""

import torch

from megagpt.metrics.step_metrics import speed
from megagpt.train.preflight import RunSetup


def pace(setup: RunSetup, device: torch.device, tokens_per_sec: float, steps: range) -> dict[str, float]:
    """Return the metrics of speed over these steps, whose rows have had a mean length that FLOPs depend on."""
    cfg = setup.run.megagpt
    lengths = cfg.schedule.rows(cfg.seq_len)
    rows = (lengths.total(steps.stop) - lengths.total(steps.start)) // len(steps)
    return speed(setup.run, setup.data.vocab_size, tokens_per_sec, device, rows=rows, compiled=setup.compiled)


def eta_seconds(setup: RunSetup, step: int, seconds: float) -> float:
    """Return the seconds to the last step, at the pace of this start, which has taken `seconds` up to `step`."""
    schedule = setup.run.megagpt.schedule
    batches = schedule.batches(setup.batch.global_batch)
    begin, now, end = map(batches.total, (setup.state.step, step, schedule.max_steps))
    return (end - now) * seconds / (now - begin)
