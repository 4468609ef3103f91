"""Position encodings other than GPT-2's learned table.

Shapes: B batch, T query positions, S key positions, H heads, D width that is paired (of a head, or the embeddings').
"""

import math

import torch
from torch import Tensor


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """Return positions (..., T) times frequencies base^(-2i / width): (..., T, width / 2), in fp32."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    return positions.float().unsqueeze(-1) / base**exponents


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Return sine and cosine embeddings (..., T, width) (Vaswani et al. 2017, section 3.5), all sines first."""
    angles = _angles(positions, width, 10_000.0)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotary_tables(positions: Tensor, head_dim: int, base: float, scaling: float) -> Tensor:
    """Return the cosines and signed sines (2, ..., T, D) of rotary embeddings (Su et al. 2021, section 3.2.2).

    Positions are divided by `scaling`: position interpolation (Chen et al. 2023).
    """
    angles = _angles(positions / scaling, head_dim, base)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Rotate queries or keys x (B, H, T, D): number i with number i + D/2, by its position's angle, as Llama does.

    tables (2, T, D), or (2, B, T, D) where positions differ between samples.
    """
    cos, sin = tables.unsqueeze(-3).to(x.dtype)  # each (T, D) or (B, T, D), with a 1 for the heads
    # Each number with its partner: backward then has no halves to copy together, which costs more than the products.
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def alibi_slopes(n_head: int) -> list[float]:
    """Return each head's slope (Press et al. 2022, section 3): 2^(-8 i / n) for powers of two.

    For other numbers, those of the power of two below, then every other slope of the one above.
    """
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    between = [2.0 ** (-4.0 * i / n) for i in range(1, 2 * n + 1, 2)]
    return slopes + between[: n_head - n]


def alibi_mask(n_head: int, queries: Tensor, n_keys: int, visible: Tensor | None) -> Tensor:
    """Return what is added to the scores of queries at these positions: -slope * distance, -inf where not visible.

    (1, H, T, S) for queries (T,), (B, H, T, S) for queries (B, T) or with a mask `visible` (B, 1, T, S), which replaces
    the causal rule. Keys are at positions 0 to n_keys - 1.
    """
    distance = queries.unsqueeze(-1) - torch.arange(n_keys, device=queries.device)  # (T, S) or (B, T, S)
    distance = distance.unsqueeze(-3)  # with a 1 for the heads
    slopes = torch.tensor(alibi_slopes(n_head), device=queries.device).view(n_head, 1, 1)
    bias = (-slopes * distance).masked_fill(~(distance >= 0 if visible is None else visible), -math.inf)
    return bias if bias.dim() == 4 else bias.unsqueeze(0)
