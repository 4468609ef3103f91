"""Choose the next token of each text: repetition penalty, temperature, top-k, top-p, min-p, and a draw.

Filters apply in the order that other libraries have: each to what the ones before it have kept.

Shapes: B texts, V vocabulary, K tokens that may be drawn.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megagpt.config.generation import GenerationConfig

BLOCK = 128  # random numbers that are drawn at a time


def pick(logits: Tensor, u: Tensor, cfg: GenerationConfig) -> Tensor:
    """Return one token (B,) for each row of fp32 logits (B, V), given numbers u (B, 1) in [0, 1).

    Temperature 0 takes the likeliest token, and needs no u.
    """
    if cfg.temperature == 0.0:
        return logits.argmax(-1)
    p, tokens = candidates(logits / cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p)
    # Inverse transform sampling. The order of the tokens is that of their ids, since an order by probability may depend
    # on how logits were rounded, which depends on the batch.
    below = p.double().cumsum(-1)  # (B, K)
    place = (below <= u * below[:, -1:]).sum(-1, keepdim=True).clamp(max=p.size(-1) - 1)  # (B, 1)
    return (place if tokens is None else tokens.gather(-1, place)).squeeze(-1)


def candidates(logits: Tensor, *, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Return weights (B, K), 0 for a token that is filtered out, and the tokens (B, K) in order; None for all."""
    tokens = None
    if 0 < top_k < logits.size(-1):
        logits, tokens = logits.topk(top_k)  # (B, K) each, the likeliest first
    elif top_p < 1.0:
        logits, tokens = logits.sort(descending=True)
    p = logits.softmax(-1)
    if top_p < 1.0:
        # Nucleus sampling (Holtzman et al. 2020): drop a token if the likelier ones make up top_p. The first stays.
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    if min_p > 0.0:  # Nguyen et al. 2024
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    if tokens is None:
        return p, None
    tokens, order = tokens.sort(-1)
    return p.gather(-1, order), tokens


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that a text has `seen` (B, V) less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def uniforms(seeds: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield numbers (B, 1) in [0, 1) without end, drawn for each text from its own seed.

    They depend on the seed and on how many came before, and on neither the batch nor the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.rand(BLOCK, dtype=torch.float64, generator=generator) for generator in generators]
        yield from torch.stack(drawn, dim=1).unsqueeze(-1).to(device)  # (BLOCK, B, 1)
