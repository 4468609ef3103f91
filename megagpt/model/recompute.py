"""Activation checkpointing: which activations a block keeps for backward, and which it recomputes there.

A policy is a function that runs block number i, to be set as `GPT.recompute`. No policy changes a gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import Dropout
from megagpt.model.gpt import Block, Output, Recompute, keep_activations

RunAgain = Callable[..., Output]  # runs a block on its inputs so that backward recomputes it

IN_THE_GRAPH = ("selective", "budget")  # the policies that torch.compile carries out within compiled blocks

aten = torch.ops.aten

MATMULS = {aten.mm.default, aten.addmm.default, torch.ops.mkldnn._linear_pointwise.default}

ATTENTIONS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute_blocks(
    cfg: RecomputeConfig, dropout: Dropout, run_again: RunAgain | None = None, *, compiled: bool = False
) -> Recompute:
    """Return how the model runs its blocks; run_again replaces torch's checkpoint (policies full and every_k)."""
    if cfg.policy == "none" or (compiled and cfg.policy in IN_THE_GRAPH):
        recompute = keep_activations
    else:
        recompute = _every(cfg.k or 1, run_again or _torch_checkpoint(cfg, dropout))
    return on_the_host(recompute) if cfg.offload else recompute


def recompute_inside(cfg: RecomputeConfig, dropout: Dropout) -> Callable[..., Tensor] | None:
    """Return the checkpoint function to compile into a block's forward pass, or None; for the policy `selective`."""
    return _torch_checkpoint(cfg, dropout) if cfg.policy == "selective" else None


def set_memory_budget(cfg: RecomputeConfig) -> None:
    """Limit the fraction of activations that compiled blocks save for backward."""
    budget = 1.0 if cfg.budget is None else cfg.budget
    if torch._functorch.config.activation_memory_budget != budget:
        torch.compiler.reset()  # else graphs that this process compiled for another budget would be used again
        torch._functorch.config.activation_memory_budget = budget


def _torch_checkpoint(cfg: RecomputeConfig, dropout: Dropout) -> Callable[..., Tensor]:
    contexts: dict[str, Any] = {"context_fn": partial(_contexts, dropout)} if cfg.policy == "selective" else {}
    return partial(torch_checkpoint, use_reentrant=False, preserve_rng_state=dropout.inside_blocks, **contexts)


def _every(k: int, run_again: RunAgain) -> Recompute:
    """Recompute blocks 0, k, 2 k, ..., and keep the activations of the others."""

    def recompute(i: int, block: Block, *inputs: Tensor | None) -> Output:
        return run_again(block, *inputs) if i % k == 0 else keep_activations(i, block, *inputs)

    return recompute


def _contexts(dropout: Dropout) -> Any:
    return create_selective_checkpoint_contexts(_Selective(dropout))


class _Selective:
    """Keeps the outputs of attention and of the first of every two matrix products: c_attn and mlp.c_fc.

    The rest is cheap to recompute: LayerNorms, GELU and attn.c_proj (the second product of its pair; torch stops before
    mlp.c_proj, whose output no gradient needs unless dropout follows it).
    """

    def __init__(self, dropout: Dropout) -> None:
        # Attention with dropout must draw its random numbers again: if it were skipped, later masks would shift.
        self.kept = set() if dropout.attention > 0.0 else ATTENTIONS
        self.products = {False: 0, True: 0}  # counted in the forward pass, and while recomputing

    def __call__(self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in self.kept
        if op in MATMULS:
            self.products[ctx.is_recompute] += 1
            keep = self.products[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def on_the_host(recompute: Recompute) -> Recompute:
    """Offload what autograd keeps of the blocks to host memory until backward.

    The copies use pinned memory and the device's own stream, so that the host never waits for them (torch's save_on_cpu
    does, and copies the weights too).
    """

    def to_host(kept: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if isinstance(kept, nn.Parameter) or isinstance(kept._base, nn.Parameter):
            return kept  # stays on the device anyway
        host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return kept.device, host.copy_(kept, non_blocking=True)

    def to_device(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    def offloaded(i: int, block: Block, *inputs: Tensor | None) -> Output:
        with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
            return recompute(i, block, *inputs)

    return offloaded
