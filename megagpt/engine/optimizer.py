"""Build the optimizer from the run file: Adam, its weight-decay groups, its kernel, gradient clipping.

Another optimizer also concerns config/deepspeed.py: OptimizerConfig, reshard.py: MOMENTS and planner/memory.py: ADAM.
"""

from collections.abc import Iterable
from typing import Any, Literal

import deepspeed
import torch
from torch import nn
from torch.optim import Optimizer

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.engine.without_compiler import step_without_compiler


def decay_groups(
    model: nn.Module, weight_decay: float, decay_on: Literal["matrices", "all"] = "matrices"
) -> list[dict[str, Any]]:
    """Return Adam's groups: the parameters that decay (by default the matrices), and biases and LayerNorm gains."""
    params = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in params if decay_on == "all" or _ndim(p) >= 2]
    others = [p for p in params if not any(p is q for q in decays)]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _ndim(p: nn.Parameter) -> int:
    return len(getattr(p, "ds_shape", p.shape))  # under ZeRO-3 the local shard is flat


def clip_before_step(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the global gradient norm before each step, and leave the norm where DeepSpeed reads it."""

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if max_norm > 0.0:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(clip)


def build_optimizer(groups: Iterable[dict[str, Any]], ds: DeepSpeedConfig, device: torch.device) -> Optimizer:
    """Build Adam: torch's fused kernel, whose update UpdateGate can skip; DeepSpeed's CPUAdam for offload from a GPU.

    `groups`: as `decay_groups` makes them, or their flat copies under ZeRO.
    """
    p = ds.optimizer.params
    decoupled = ds.optimizer.type == "AdamW" or p.adam_w_mode
    adam: dict[str, Any] = {"lr": p.lr, "betas": p.betas, "eps": p.eps}
    optimizer: Optimizer
    if ds.uses_cpu_adam(device.type):
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **adam)
    else:
        optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, fused=True, **adam)
        step_without_compiler(optimizer)
    if clips_itself(ds):
        clip_before_step(optimizer, ds.gradient_clipping)
    return optimizer


def clips_itself(ds: DeepSpeedConfig) -> bool:
    """Tell whether the optimizer clips: at ZeRO stage 0 in fp32 DeepSpeed would clip, but does not keep the norm."""
    return ds.zero_optimization.stage == 0 and ds.dtype == "fp32"
