"""GPT-2 as one writes it down in plain PyTorch: the peer's model, which no change of ours makes faster or slower.

Shapes: B batch, T positions, C width, V vocabulary. Parameters have our names, so that our weights load.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.model import ModelConfig


class Attention(nn.Module):
    def __init__(self, C: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, C: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(C), Attention(C, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(C), MLP(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        C = cfg.n_embd
        self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(cfg.seq_len, C)
        self.h = nn.ModuleList(Block(C, cfg.n_head) for _ in range(cfg.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(C), nn.Linear(C, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens and targets (B, T) -> mean nats per token."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
