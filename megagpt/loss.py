"""Next-token cross-entropy, in fp32.

Shapes: B batch, T positions, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from megagpt.rows import IGNORE


def next_token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """logits (B, T, V), targets (B, T) already shifted by one -> mean nats per token that is not IGNORE; 0 if all are.

    z_loss adds its weight times the mean squared log partition function (Chowdhery et al. 2022, PaLM, section 5).
    """
    flat, targets = logits.flatten(0, 1).float(), targets.flatten()  # (B*T, V): a bf16 loss would be rounded to 1/32
    kept = targets != IGNORE
    loss = F.cross_entropy(flat, targets, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="sum")
    if z_loss > 0.0:
        loss = loss + z_loss * (flat.logsumexp(-1).square() * kept).sum()
    return loss / kept.sum().clamp(min=1)


def kept_share(targets: Tensor) -> Tensor:
    """Of all targets those with a loss: exactly 1 where nothing is ignored. Stays on the device."""
    return (targets != IGNORE).float().mean()
