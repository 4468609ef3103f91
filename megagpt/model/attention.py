"""Causal attention: functions of (q, k, v), one for each name that the run file may choose.

The queries are the last T of the S positions that the keys cover, so one function serves training (T = S)
and generation with a key-value cache (T < S). A mask (B, 1, T, S), true where a query may attend, replaces this rule;
a mask of numbers (B, H, T, S) is added to the scores. Keys and values may have fewer heads than queries.

Shapes: B batch, H heads, T query positions, S key positions, D head width; P ranks that share a sequence's positions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


def eager_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Compute the textbook formula in fp32 (Vaswani et al. 2017, section 3.2.1), to check the other variant by."""
    k, v = with_heads_of(q, k, v)
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    mask = _visible(q, k) if mask is None else mask
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v  # (B, H, T, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Call PyTorch's fused kernels, which never write the (T, S) scores to memory."""
    T, S = q.size(-2), k.size(-2)
    k, v = with_heads_of(q, k, v)
    if mask is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # With T < S is_causal would align the triangle to the upper left: query 0 would see key 0 alone.
    if mask is None and T > 1:
        mask = _visible(q, k)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def with_heads_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each head of keys and values for the queries that share it (Ainslie et al. 2023, section 2.2)."""
    shared = q.size(1) // k.size(1)
    return (k, v) if shared == 1 else (k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1))


def backend_order(capability: tuple[int, int]) -> list[SDPBackend]:
    """Return the order in which to try the fused kernels on a GPU of this compute capability: torch's, or cuDNN first.

    cuDNN's takes about half the time of FlashAttention 2 on Hopper, and longer on the generations before and after it
    (huggingface/transformers, pull request 48163).
    """
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    return sorted(order, key=lambda backend: capability == (9, 0) and backend != SDPBackend.CUDNN_ATTENTION)


def prefer_cudnn(device: torch.device) -> None:
    """Set `backend_order` for the whole process, since a compiled graph takes its kernel when it is traced."""
    if device.type == "cuda":
        order = backend_order(torch.cuda.get_device_capability(device))
        torch._C._set_sdp_priority_order([backend.value for backend in order])


def _visible(q: Tensor, k: Tensor) -> Tensor:
    """Return (T, S) booleans: query t, at position S - T + t, may attend to every key up to its own position."""
    T, S = q.size(-2), k.size(-2)
    return torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)


Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def over_ranks(attend: Attention, exchange: Callable[[Tensor], Tensor], P: int) -> Attention:
    """Return attention for P ranks with T of a sequence's P * T positions each (Ulysses, Jacobs et al. 2023).

    Ranks exchange heads for positions, so that each computes H / P heads over all positions, which a mask covers too.
    `exchange` is an all-to-all: it sends x[p] of x (P, ...) to rank p, and returns what was sent here in rank order.
    """

    def attend_over_ranks(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
        B, H, T, D = q.shape
        k, v = with_heads_of(q, k, v)  # there may be fewer of them than ranks
        mine = [x.view(B, P, H // P, T, D).transpose(0, 1) for x in (q, k, v)]  # each (P, B, H/P, T, D)
        got = exchange(torch.stack(mine, dim=1))  # (P, 3, B, H/P, T, D)
        q, k, v = got.permute(1, 2, 3, 0, 4, 5).reshape(3, B, H // P, P * T, D)
        y = attend(q, k, v, dropout, mask)  # (B, H/P, P*T, D)
        y = y.view(B, H // P, P, T, D).permute(2, 0, 1, 3, 4)  # (P, B, H/P, T, D)
        return exchange(y).transpose(0, 1).reshape(B, H, T, D)

    return attend_over_ranks


ATTENTION: dict[str, Attention] = {"sdpa": sdpa_attention, "eager": eager_attention}
