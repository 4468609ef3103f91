"""Causal attention variants: plain functions of (q, k, v), chosen by name in the run file.

The queries are the last T of the S positions that the keys cover, so one function serves training (T = S)
and generation with a key-value cache (T < S). A mask (B, 1, T, S), true where a query may look, replaces that rule.

Shapes: B batch, H heads, T query positions, S key positions, D head width; P ranks that share a sample's positions.
"""

import math
from collections.abc import Callable

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


Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def over_ranks(attend: Attention, exchange: Callable[[Tensor], Tensor], P: int) -> Attention:
    """Attention where each of P ranks has T of a sample's P * T positions (Ulysses, Jacobs et al. 2023).

    Heads are exchanged for positions, so that each rank attends with H / P heads over all of them; the mask is of all.
    `exchange` sends x[p] to rank p of x (P, ...), and returns what was sent here in the order of ranks.
    """

    def attend_over_ranks(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
        B, H, T, D = q.shape
        mine = [x.view(B, P, H // P, T, D).transpose(0, 1) for x in (q, k, v)]  # each (P, B, H/P, T, D)
        got = exchange(torch.stack(mine, dim=1))  # (P, 3, B, H/P, T, D): of all positions, a share of the heads
        q, k, v = got.permute(1, 2, 3, 0, 4, 5).reshape(3, B, H // P, P * T, D)
        y = attend(q, k, v, dropout, mask)  # (B, H/P, P*T, D)
        y = y.view(B, H // P, P, T, D).permute(2, 0, 1, 3, 4)  # (P, B, H/P, T, D)
        return exchange(y).transpose(0, 1).reshape(B, H, T, D)

    return attend_over_ranks


ATTENTION: dict[str, Attention] = {"sdpa": sdpa_attention, "eager": eager_attention}
