"""Next-token cross-entropy in fp32: from logits, or from the last hidden states in chunks, never holding all logits.

A `Score` is a function that the model calls with those hidden states and the output matrix, in place of returning
logits.

Shapes: B batch, T positions, C width, V vocabulary, N tokens in a chunk.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.data.loss_mask import IGNORE
from megagpt.model.products import by_onednn, linear, product

# hidden states (B, T, C), output matrix (V, C), the cap of logits if there is one -> loss
Score = Callable[[Tensor, Tensor, float | None], Tensor]

CHUNK_BYTES = 2**28  # of fp32 logits: 1,334 tokens of 50,304; large enough for a matrix product at full speed
ROW_BLOCK_BYTES = 2**22  # of fp32 logits that a CPU works on at a time: they stay in its cache
CHUNK_TOKENS = 2**15  # with a small vocabulary: a sum over more normalized states could exceed 65,504, fp16's maximum


def next_token_score(
    targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0, compiled: bool = False
) -> Score:
    """Return a score for training that is `next_token_loss` of targets (B, T), computed in chunks if one is too large.

    `compiled` fuses the loss of a chunk with torch.compile.
    """

    def score(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
        n_tokens, vocab_size = targets.numel(), weight.size(0)
        in_blocks = not compiled and x.device.type == "cpu" and 4 * n_tokens * vocab_size > ROW_BLOCK_BYTES
        if chunks(n_tokens, vocab_size) == 1 and not (compiled or in_blocks):
            logits = capped(linear(x.flatten(0, -2), weight), softcap).view(*x.shape[:-1], -1)
            return next_token_loss(logits, targets, label_smoothing=label_smoothing, z_loss=z_loss)
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        gradient = partial(_compiled() if compiled else chunk_gradient, **options)
        if in_blocks:
            gradient = partial(by_row_blocks, gradient)
        return ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), gradient)

    return score


def token_nats(targets: Tensor) -> Score:
    """Return a score for evaluation: each token's loss (B, T) in nats, without gradient, smoothing and z-loss."""

    def score(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
        n = chunks(targets.numel(), weight.size(0))
        rows = zip(x.flatten(0, 1).chunk(n), targets.flatten().chunk(n), strict=True)
        nats = [
            F.cross_entropy(capped(linear(some, weight), softcap).float(), wanted, reduction="none")
            for some, wanted in rows
        ]
        return torch.cat(nats).view_as(targets)

    return score


def target_scores(targets: Tensor, vocab_size: int) -> Score:
    """Return a score (2, B, T): each target's log probability, and 1 where no other token is likelier.

    The ids that pad the vocabulary have no part in it, as in an export and in generation.
    """

    def score(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
        n = chunks(targets.numel(), weight.size(0))
        found = []
        for some, wanted in zip(x.flatten(0, 1).chunk(n), targets.flatten().chunk(n), strict=True):
            logits = capped(linear(some, weight), softcap)[:, :vocab_size].float()  # (N, vocab_size)
            log_p = -F.cross_entropy(logits, wanted, reduction="none")
            found.append(torch.stack([log_p, (logits.argmax(-1) == wanted).float()]))
        return torch.cat(found, 1).view(2, *targets.shape)

    return score


def chunks(n_tokens: int, vocab_size: int) -> int:
    """Return into how many chunks the tokens are cut, limited by memory and by what fp16 can add up."""
    return max(math.ceil(4 * n_tokens * vocab_size / CHUNK_BYTES), math.ceil(n_tokens / CHUNK_TOKENS))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), so that no logit grows beyond it (Gemma Team 2024, section 2)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def next_token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Return the mean loss in nats over the targets that are not IGNORE, 0 if all are, of logits (B, T, V).

    targets (B, T) are already shifted by one.
    z_loss adds its weight times the mean squared log partition function (Chowdhery et al. 2022, PaLM, section 5).
    """
    # In fp32, because a bf16 loss of about 10 would be off by up to 1/32.
    flat, targets = logits.flatten(0, 1).float(), targets.flatten()  # (B*T, V), (B*T,)
    kept = targets != IGNORE
    loss = F.cross_entropy(flat, targets, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="sum")
    if z_loss > 0.0:
        loss = loss + z_loss * (flat.logsumexp(-1).square() * kept).sum()
    return loss / kept.sum().clamp(min=1)


class ChunkedLoss(torch.autograd.Function):
    """Computes next_token_loss(F.linear(x, weight), targets) in chunks, and frees the logits of each chunk.

    The gradient is known as soon as the logits are, so forward computes both, nothing is recomputed, and backward only
    scales. torch 2.13's F.linear_cross_entropy does the same, but has no z-loss. Backward does not need the output
    matrix, which ZeRO-3 would have to gather again for every chunk.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, gradient: Callable[..., Any]) -> Tensor:
        """Return the mean loss of x (B*T, C), weight (V, C), targets (B*T); `gradient` is as `chunk_gradient`."""
        n = chunks(len(targets), len(weight))
        x_grad = torch.empty_like(x)
        # In fp32 if many chunks are added up; a single one needs no sum.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if n > 1 else None
        total = torch.zeros((), device=x.device)
        for some, wanted, some_grad in zip(x.chunk(n), targets.chunk(n), x_grad.chunk(n), strict=True):
            loss, grad, scale = gradient(linear(some, weight), wanted)
            total += loss
            # The chain rule through logits = x @ weight.T, whose gradient is grad * scale.
            some_grad.copy_(product(grad, weight) * scale)
            weight_grad = _plus_product(weight_grad, grad.t(), (some * scale).to(grad.dtype))
        kept = (targets != IGNORE).sum().clamp(min=1)
        ctx.save_for_backward(x_grad, weight_grad, kept)
        ctx.weight_dtype = weight.dtype
        return total / kept

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients, which are divided by the tokens only here: before loss scaling, fp16 would underflow."""
        x_grad, weight_grad, kept = ctx.saved_tensors
        scale = outer[0] / kept
        return x_grad * scale, (weight_grad * scale).to(ctx.weight_dtype), None, None


def chunk_gradient(
    logits: Tensor, targets: Tensor, *, label_smoothing: float, z_loss: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss of logits (N, V), targets (N,), and its gradient by the logits as factors (N, V), (N, 1).

    With p = softmax(logits), y one-hot and Z the partition function, that gradient is (1 + 2 z_loss log Z) p minus
    (1 - label_smoothing) y minus label_smoothing / V. The first factor is that, the second is 0 for ignored targets.
    A cap multiplies it by its own derivative, 1 - (capped logits / softcap)^2.
    """
    logits = capped(logits, softcap)
    kept = (targets != IGNORE).unsqueeze(1)  # (N, 1)
    wanted = targets.clamp(min=0).unsqueeze(1)
    chosen = logits.gather(1, wanted).float()
    log_p = F.log_softmax(logits, -1, dtype=torch.float32)  # (N, V)
    nats = -log_p.gather(1, wanted)  # (N, 1)
    # Label smoothing mixes the target with the uniform distribution over the vocabulary.
    loss = (1.0 - label_smoothing) * nats
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * log_p.mean(-1, keepdim=True)
    log_z = chosen + nats  # since log p = logit - log Z
    loss = loss + z_loss * log_z.square()
    # The gradient, term by term and in place: at this point the softmax p is the only large tensor besides the logits.
    grad = log_p.exp_()
    if z_loss > 0.0:
        grad *= 1.0 + 2.0 * z_loss * log_z
    grad.scatter_add_(1, wanted, torch.full_like(nats, label_smoothing - 1.0))
    if label_smoothing > 0.0:
        grad -= label_smoothing / logits.size(1)
    if softcap is not None:
        grad *= 1.0 - (logits.float() / softcap).square()
    return (loss * kept).sum(), grad.to(logits.dtype), kept


def by_row_blocks(
    gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `gradient` on blocks of a few rows, and return the same; the first factor overwrites the logits."""
    n = max(1, ROW_BLOCK_BYTES // (4 * logits.size(1)))
    losses, scales = [], []
    for rows, wanted in zip(logits.split(n), targets.split(n), strict=True):
        loss, grad, scale = gradient(rows, wanted)
        rows.copy_(grad)
        losses.append(loss)
        scales.append(scale)
    return torch.stack(losses).sum(), logits, torch.cat(scales)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Compile `chunk_gradient`: on a GPU its softmax takes longer than the matrix products, unless passes are fused."""
    return torch.compile(chunk_gradient, dynamic=False, fullgraph=True)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b, added in place and in total's precision; without a total, a @ b."""
    if total is None:
        return product(a, b)
    in_one = a.dtype == total.dtype and not by_onednn(a, b)
    return total.addmm_(a, b) if in_one else total.add_(product(a, b))


def kept_share(targets: Tensor) -> Tensor:
    """Return the fraction of targets with a loss, exactly 1 if none is ignored, as a tensor on their device."""
    return (targets != IGNORE).float().mean()
