"""Next-token cross-entropy, in fp32.

Shapes: B batch, T positions, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """logits (B, T, V), targets (B, T) already shifted by one -> mean nats per token.

    z_loss adds its weight times the mean squared log partition function (Chowdhery et al. 2022, PaLM, section 5).
    """
    flat = logits.flatten(0, 1).float()  # (B*T, V); a bf16 loss would be rounded to 1/32
    loss = F.cross_entropy(flat, targets.flatten(), label_smoothing=label_smoothing)
    if z_loss > 0.0:
        loss = loss + z_loss * flat.logsumexp(-1).square().mean()
    return loss
