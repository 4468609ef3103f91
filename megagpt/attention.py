"""Causal attention variants: plain functions of (q, k, v), chosen by name in the run file.

The queries are the last T of the S positions that the keys cover, so one function serves training (T = S)
and generation with a key-value cache (T < S). A mask (B, 1, T, S), true where a query may look, replaces that rule.

Shapes: B batch, H heads, T query positions, S key positions, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


def eager_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """The textbook formula in fp32 (Vaswani et al. 2017, section 3.2.1): the reference for the other variant."""
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    visible = _visible(q, k) if mask is None else mask
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v  # (B, H, T, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused kernels, which never write the (T, S) scores to memory."""
    T, S = q.size(-2), k.size(-2)
    if mask is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask is None and T > 1:
        mask = _visible(q, k)  # is_causal would align T < S to the wrong corner
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def backend_order(capability: tuple[int, int]) -> list[SDPBackend]:
    """Which fused kernel to try first on a GPU of this compute capability, with torch's own order behind it.

    cuDNN's takes about half the time of FlashAttention 2 on Hopper, and longer on the generations around it
    (huggingface/transformers, pull request 48163).
    """
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    return sorted(order, key=lambda backend: capability == (9, 0) and backend != SDPBackend.CUDNN_ATTENTION)


def prefer_cudnn(device: torch.device) -> None:
    """For the whole process, since a compiled graph takes its kernel when it is traced."""
    if device.type == "cuda":
        order = backend_order(torch.cuda.get_device_capability(device))
        torch._C._set_sdp_priority_order([backend.value for backend in order])


def _visible(q: Tensor, k: Tensor) -> Tensor:
    """(T, S) booleans: query t, which stands at position S - T + t, sees every key up to its own position."""
    T, S = q.size(-2), k.size(-2)
    return torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}
