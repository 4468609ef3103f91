"""Compute the learning rate: warmup and decay as a factor on the peak rate."""

import math
from collections.abc import Callable

from megagpt.config.schema import ScheduleConfig


def lr_factor(step: int, cfg: ScheduleConfig) -> float:
    """Return the factor on the peak rate of update `step` (0-based): linear warmup, then the chosen shape."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return SHAPES[cfg.shape](step, cfg)


def _progress(step: int, cfg: ScheduleConfig, begin: int) -> float:
    """0 at `begin`, 1 at the last update."""
    return min(1.0, (step - begin) / max(1, cfg.max_steps - 1 - begin))


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
    begin = cfg.max_steps - (cfg.decay_steps or 0) - 1
    return 1.0 if step <= begin else 1 - (1 - cfg.min_lr_ratio) * _progress(step, cfg, begin)


SHAPES: dict[str, Callable[[int, ScheduleConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "warmup-stable-decay": _warmup_stable_decay,
}
