"""Compute the learning rate: warmup and decay as a factor on the peak rate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megagpt.config.schedule import ScheduleConfig


def lr_factor(step: int, cfg: ScheduleConfig) -> float:
    """Return the factor on the peak rate of update `step` (0-based): linear warmup, then the chosen shape."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return SHAPES[cfg.shape](step, cfg)


def jump_of_rate(saved_run: Mapping[str, Any], step: int, peak: float, cfg: ScheduleConfig) -> str | None:
    """Describe the jump of the rate from update `step`, the last one of a saved run, to the next one by `cfg`.

    None if the saved run file would have continued alike, or if the rate changes by less than half of it.
    `saved_run` is that file, of this or an older version.
    """
    before, saved_peak = (
        ScheduleConfig(**saved_run["megagpt"]["schedule"]),
        float(saved_run["optimizer"]["params"]["lr"]),
    )
    was, planned = (saved_peak * lr_factor(n, before) for n in (step - 1, step))
    now = peak * lr_factor(step, cfg)
    if now == planned or was / 1.5 <= now <= was * 1.5:
        return None
    can_stay = now > was and step >= before.curve_steps and peak == saved_peak
    keep = f"; megagpt.schedule.end_step={before.curve_steps} keeps the old curve, and its last rate from there on"
    return f"learning rate: {was:.2e} in step {step}, {now:.2e} in step {step + 1}{keep if can_stay else ''}"


def _progress(step: int, cfg: ScheduleConfig, begin: int) -> float:
    """Return how far the decay is: 0 at `begin`, 1 at the last update of the curve and after it."""
    return min(1.0, (step - begin) / max(1, cfg.curve_steps - 1 - begin))


def _cosine(step: int, cfg: ScheduleConfig) -> float:
    """Half a cosine from 1 to min_lr_ratio (Loshchilov and Hutter 2017, equation 5, without restarts)."""
    half = 0.5 * (1 + math.cos(math.pi * _progress(step, cfg, cfg.warmup_steps)))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * half


def _linear(step: int, cfg: ScheduleConfig) -> float:
    return 1 - (1 - cfg.min_lr_ratio) * _progress(step, cfg, cfg.warmup_steps)


def _constant(step: int, cfg: ScheduleConfig) -> float:
    return 1.0


def _warmup_stable_decay(step: int, cfg: ScheduleConfig) -> float:
    """Constant, then linear over the last decay_steps (Hu et al. 2024, MiniCPM, section 4.2)."""
    begin = cfg.curve_steps - (cfg.decay_steps or 0) - 1
    return 1.0 if step <= begin else 1 - (1 - cfg.min_lr_ratio) * _progress(step, cfg, begin)


def _range_test(step: int, cfg: ScheduleConfig) -> float:
    """Rise by the same factor in each step, from min_lr_ratio to 1 (Smith 2017, section 3.3)."""
    return max(cfg.min_lr_ratio, 1e-12) ** (1 - _progress(step, cfg, cfg.warmup_steps))


SHAPES: dict[str, Callable[[int, ScheduleConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "warmup-stable-decay": _warmup_stable_decay,
    "range-test": _range_test,
}
