"""The layers that blocks are made of, each of which initializes itself: linear ones, embeddings, norms, mixes."""

import torch
from torch import Tensor, nn

from megagpt.config.model import ModelConfig
from megagpt.model.products import linear


class Linear(nn.Linear):
    """nn.Linear with GPT-2's initialization inside __init__, because ZeRO-3 shards a layer as soon as it is built."""

    packed: Tensor | None = None  # the weight as packed_weights.py lays it out, while a model generates on a CPU

    def __init__(self, n_in: int, n_out: int, *, std: float = 0.02, bias: bool = True) -> None:
        self.std = std
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        draw_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed  # read once: another thread may end its generation
        if packed is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
            return y
        # With two dimensions. To a product with three, DeepSpeed's linear function of ZeRO-3 adds the bias in place;
        # where the policy `selective` has kept that product, it is added twice, and gradients are wrong.
        return linear(x.flatten(0, -2), self.weight, self.bias).view(*x.shape[:-1], -1)


class Embedding(nn.Embedding):
    """nn.Embedding with GPT-2's initialization, for the same reason."""

    def reset_parameters(self) -> None:
        draw_normal(self.weight, 0.02)


def norm(cfg: ModelConfig, width: int) -> nn.Module:
    """Return the model's norm: LayerNorm (Ba et al. 2016), or RMSNorm (Zhang and Sennrich 2019)."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(width, eps=cfg.norm_eps, bias=cfg.bias)
    return nn.RMSNorm(width, eps=cfg.norm_eps, elementwise_affine=cfg.norm == "rmsnorm")


@torch.no_grad()
def draw_normal(weight: Tensor, std: float) -> None:
    """Draw on the CPU in fp32, whatever the weight's device and type, so that all ZeRO stages start with the same."""
    if not weight.is_meta:  # those only stand for weights that are loaded
        weight.copy_(torch.normal(0.0, std, weight.shape, device="cpu"))


class Mix(nn.Module):
    """Mixes what a block computes with what the first one did: a * x + b * first, a and b trained from 1 and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        a, b = self.scalars.to(x.dtype)
        return a * x + b * first
