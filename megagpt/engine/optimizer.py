"""Weight-decay groups, clipping, and the learning-rate curve."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from megagpt.config.schema import ScheduleConfig


def decay_groups(
    model: nn.Module, weight_decay: float, decay_on: Literal["matrices", "all"] = "matrices"
) -> list[dict[str, Any]]:
    """Two groups for Adam: what decays (by default the matrices), and biases and LayerNorm gains, which do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in params if decay_on == "all" or _ndim(p) >= 2]
    others = [p for p in params if not any(p is q for q in decays)]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _ndim(p: nn.Parameter) -> int:
    return len(getattr(p, "ds_shape", p.shape))  # under ZeRO-3 the local shard is flat


def clip_before_step(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the global gradient norm, and leave the norm where DeepSpeed looks for it."""

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if max_norm > 0.0:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(clip)


def lr_factor(step: int, cfg: ScheduleConfig) -> float:
    """Factor on the peak rate for the update numbered `step` (0-based): linear warmup, then the chosen shape."""
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
