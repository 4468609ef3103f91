"""Build the optimizer from the run file: Adam or Muon, its groups of parameters, its kernel, gradient clipping.

Another optimizer also concerns config/deepspeed.py: OptimizerConfig, checkpoint/identity.py,
reshard.py: MOMENTS and planner/memory.py: ADAM.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import deepspeed
import torch
from torch import nn
from torch.optim import Optimizer

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.engine.cautious import CautiousAdamW
from megagpt.engine.muon import Muon
from megagpt.engine.without_compiler import step_without_compiler


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    decay_on: Literal["matrices", "all"] = "matrices",
    *,
    momentum: float | None = None,
) -> list[dict[str, Any]]:
    """Return Adam's groups: the parameters that decay (by default the matrices), and biases and LayerNorm gains.

    With a `momentum`, the matrices inside the blocks are a third group, the last, which Muon updates.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ndims = {name: _ndim(p) for name, p in params.items()}
    decays, others, hidden = names_in_groups(ndims, decay_on, muon=momentum is not None)
    groups: list[dict[str, Any]] = [
        {"params": [params[name] for name in decays], "weight_decay": weight_decay},
        {"params": [params[name] for name in others], "weight_decay": 0.0},
        {"params": [params[name] for name in hidden], "weight_decay": weight_decay, "momentum": momentum},
    ]
    return [group for group in groups if group["params"]]


def names_in_groups(
    ndims: Mapping[str, int], decay_on: Literal["matrices", "all"], *, muon: bool
) -> tuple[list[str], list[str], list[str]]:
    """Return the parameters of each group of `decay_groups`, some perhaps empty. `ndims`: of all, in model order."""
    hidden = [name for name in ndims if muon and name.startswith("h.") and ndims[name] == 2]
    decays = [name for name in ndims if (decay_on == "all" or ndims[name] >= 2) and name not in hidden]
    return decays, [name for name in ndims if name not in decays and name not in hidden], hidden


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

    Muon has that kernel of Adam too.

    `groups`: as `decay_groups` makes them, or their flat copies under ZeRO.
    """
    p = ds.optimizer.params
    decoupled = ds.optimizer.type != "Adam" or p.adam_w_mode
    adam: dict[str, Any] = {"lr": p.lr, "betas": p.betas, "eps": p.eps}
    optimizer: Optimizer
    if ds.optimizer.type == "Muon":
        optimizer = Muon(groups, cautious=p.cautious_weight_decay, **adam)
        step_without_compiler(optimizer)
    elif ds.uses_cpu_adam(device.type):
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **adam)
    elif p.cautious_weight_decay:
        optimizer = CautiousAdamW(groups, **adam)
        step_without_compiler(optimizer)
    else:
        optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, fused=True, **adam)
        step_without_compiler(optimizer)
    if clips_itself(ds):
        clip_before_step(optimizer, ds.gradient_clipping)
    return optimizer


def clips_itself(ds: DeepSpeedConfig) -> bool:
    """Tell whether the optimizer clips: at ZeRO stage 0 in fp32 DeepSpeed would clip, but does not keep the norm."""
    return ds.zero_optimization.stage == 0 and ds.dtype == "fp32"
