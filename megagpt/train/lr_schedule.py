"""Compute what changes from step to step: the learning rate's factor, the weight decay's, and Muon's momentum."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megagpt.config.schedule import ScheduleConfig
from megagpt.train_state import TrainState

FIRST_MOMENTUM = 0.85  # of Muon, with a warm-up


def lr_factor(step: int, cfg: ScheduleConfig) -> float:
    """Return the factor on the peak rate of update `step` (0-based): linear warmup, then the chosen shape."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return SHAPES[cfg.shape](step, cfg)


def jumps_of_rates(
    saved_run: Mapping[str, Any], step: int, peaks: Mapping[str, float], cfg: ScheduleConfig
) -> list[str]:
    """Describe the jump of each rate from update `step`, the last one of a saved run, to the next one by `cfg`.

    Not of those that the saved run file would have continued alike, or that change by less than half of themselves.
    `saved_run` is that file, of this or an older version; `peaks` are the peak rates, by their keys: lr, and muon_lr.
    """
    found = []
    before, saved_params = ScheduleConfig(**saved_run["megagpt"]["schedule"]), saved_run["optimizer"]["params"]
    for name, peak in peaks.items():
        saved_peak = float(saved_params.get(name) or saved_params["lr"])
        was, planned = (saved_peak * lr_factor(n, before) for n in (step - 1, step))
        now = peak * lr_factor(step, cfg)
        if now == planned or was / 1.5 <= now <= was * 1.5:
            continue
        can_stay = now > was and step >= before.curve_steps and peak == saved_peak
        keep = f"; megagpt.schedule.end_step={before.curve_steps} keeps the old curve, and its last rate from there on"
        rate = "learning rate" if name == "lr" else "learning rate of Muon"
        found.append(f"{rate}: {was:.2e} in step {step}, {now:.2e} in step {step + 1}{keep if can_stay else ''}")
    return found


def weight_decay_factor(step: int, cfg: ScheduleConfig) -> float:
    """Return the factor on the weight decay of update `step` (0-based); above 0, which is what never decays."""
    if cfg.weight_decay_shape == "lr":
        return max(1e-9, lr_factor(step, cfg))
    return 1.0 if cfg.weight_decay_shape == "constant" else 1.0 - min(step, cfg.curve_steps - 1) / cfg.curve_steps


def muon_momentum(step: int, momentum: float, cfg: ScheduleConfig) -> float:
    """Return Muon's momentum of update `step` (0-based), which rises linearly at first (Jordan et al. 2024)."""
    share = min(1.0, step / cfg.momentum_warmup_steps) if cfg.momentum_warmup_steps else 1.0
    first = min(FIRST_MOMENTUM, momentum)
    return first + share * (momentum - first)


def decay_in_the_past(saved_run: Mapping[str, Any], step: int, cfg: ScheduleConfig) -> str | None:
    """Return what is wrong if the decay would have begun before `step`, which the saved run did at another rate."""
    if cfg.decay_from is None or cfg.decay_from >= step:
        return None
    before = ScheduleConfig(**saved_run["megagpt"]["schedule"])
    if lr_factor(step - 1, before) == lr_factor(step - 1, cfg):
        return None
    return (
        f"megagpt.schedule.decay_from={cfg.decay_from} is in the past: the run is at step {step}, and did not decay; "
        f"set megagpt.schedule.decay_from to {step} or more"
    )


def other_tokens_so_far(state: TrainState, cfg: ScheduleConfig, global_batch: int, seq_len: int) -> str | None:
    """Return what is wrong if the steps so far had other batches or rows, so that the run would miss its max_tokens."""
    if cfg.max_tokens is None:
        return None
    batches, step, tokens_seen = cfg.batches(global_batch), state.step, state.tokens_seen
    steps = max(step, batches.steps_to(batches.total(step) - (tokens_seen - cfg.max_tokens) // seq_len))
    if steps == max(step, cfg.max_steps):
        return None
    first, last = batches.at(0) * seq_len, global_batch * seq_len
    size = f"{last}" if first == last else f"{first} to {last}"
    return (
        f"megagpt.schedule.max_tokens={cfg.max_tokens} makes {cfg.max_steps} steps of {size} tokens, "
        f"and the {step} steps so far had {tokens_seen} tokens; to train on as many in all, set "
        f"megagpt.schedule.max_tokens=null megagpt.schedule.max_steps={steps}"
    )


def _progress(step: int, cfg: ScheduleConfig, begin: int) -> float:
    """Return how far the decay is: 0 at `begin`, 1 at the last update of the curve and after it."""
    return min(1.0, (step - begin) / max(1, cfg.curve_steps - 1 - begin))


def _cosine(step: int, cfg: ScheduleConfig) -> float:
    """Half a cosine from 1 to min_lr_ratio (Loshchilov and Hutter 2017, equation 5, without restarts)."""
    half = 0.5 * (1 + math.cos(math.pi * _progress(step, cfg, cfg.warmup_steps)))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * half


def _linear(step: int, cfg: ScheduleConfig) -> float:
    return 1 - (1 - cfg.min_lr_ratio) * _progress(step, cfg, cfg.warmup_steps)


def _inverse_sqrt(step: int, cfg: ScheduleConfig) -> float:
    """Fall with the root of the steps (Vaswani et al. 2017, section 5.3), to min_lr_ratio at the lowest."""
    return max(cfg.min_lr_ratio, math.sqrt(max(1, cfg.warmup_steps) / min(step + 1, cfg.curve_steps)))


def _constant(step: int, cfg: ScheduleConfig) -> float:
    return 1.0


def _warmup_stable_decay(step: int, cfg: ScheduleConfig) -> float:
    """Constant, then linear over the last decay_steps (Hu et al. 2024, MiniCPM, section 4.2)."""
    begin = cfg.decay_from - 1 if cfg.decay_from is not None else cfg.curve_steps - (cfg.decay_steps or 0) - 1
    return 1.0 if step <= begin else 1 - (1 - cfg.min_lr_ratio) * _progress(step, cfg, begin)


def _range_test(step: int, cfg: ScheduleConfig) -> float:
    """Rise by the same factor in each step, from min_lr_ratio to 1 (Smith 2017, section 3.3)."""
    return max(cfg.min_lr_ratio, 1e-12) ** (1 - _progress(step, cfg, cfg.warmup_steps))


SHAPES: dict[str, Callable[[int, ScheduleConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "inverse-sqrt": _inverse_sqrt,
    "constant": _constant,
    "warmup-stable-decay": _warmup_stable_decay,
    "range-test": _range_test,
}
