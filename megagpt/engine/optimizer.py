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

# Groups of parameters, in their order. With rates of their own, all are apart from the other matrices.
BY_DECAY = ("decays", "others")
BY_KIND = ("embeddings", "head", "vectors", "scalars", "matrices")
SCALARS = ".scalars"  # suffix of the parameter names of `Mix`, which never decay
HIDDEN = "matrices inside the blocks"  # which Muon updates


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    decay_on: Literal["matrices", "all"] = "matrices",
    *,
    momentum: float | None = None,
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return Adam's groups: the parameters that decay (by default the matrices), and biases and LayerNorm gains.

    With a `momentum`, the matrices inside the blocks are a group of their own, the last, which Muon updates. With an
    `lr_scale`, embeddings, head, vectors, scalars and the other matrices are groups of their own, with these factors.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ndims = {name: _ndim(p) for name, p in params.items()}
    groups = []
    for kind, names in names_in_groups(
        ndims, decay_on, muon=momentum is not None, by_kind=lr_scale is not None
    ).items():
        decays = kind not in ("others", "scalars") and (kind != "vectors" or decay_on == "all")
        group = {"params": [params[name] for name in names], "weight_decay": weight_decay if decays else 0.0}
        if kind == HIDDEN:
            group["momentum"] = momentum
        elif lr_scale is not None:
            group["lr_scale"] = lr_scale.get(kind, 1.0)
        groups.append(group)
    return groups


def names_in_groups(
    ndims: Mapping[str, int], decay_on: Literal["matrices", "all"], *, muon: bool, by_kind: bool
) -> dict[str, list[str]]:
    """Return the parameters of each group of `decay_groups`. `ndims`: of all parameters, in the order of the model."""
    found: dict[str, list[str]] = {kind: [] for kind in (*(BY_KIND if by_kind else BY_DECAY), HIDDEN)}
    for name, ndim in ndims.items():
        if muon and ndim == 2 and name.startswith("h."):
            kind = HIDDEN
        elif by_kind:
            kind = _kind(name, ndim)
        else:
            decays = ndim >= 2 or (decay_on == "all" and not name.endswith(SCALARS))
            kind = "decays" if decays else "others"
        found[kind].append(name)
    return {kind: names for kind, names in found.items() if names}


def has_own_rates(optimizer: Optimizer) -> bool:
    """Tell whether embeddings, head, vectors and scalars are groups of their own."""
    return any("lr_scale" in group for group in optimizer.param_groups)


def _kind(name: str, ndim: int) -> str:
    if name in ("wte.weight", "wpe.weight"):
        return "embeddings"
    if name == "lm_head.weight":
        return "head"
    if name.endswith(SCALARS):
        return "scalars"
    return "vectors" if ndim < 2 else "matrices"


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
