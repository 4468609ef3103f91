"""GPT-2 (Radford et al. 2019), complete: embeddings, attention, MLP, pre-LayerNorm blocks, tied output head.

`ModelConfig` chooses between its parts and newer ones: rotary positions, RMSNorm, gated MLPs, grouped-query attention,
shortcuts from the first block's values and from the embeddings to every later block, sliding windows.

Shapes: B batch, T positions, S positions so far, C width (n_embd), H heads, K heads of keys and values, D head width
(C = H * D), V vocabulary.
The model is plain torch. What ranks and DeepSpeed need is handed in: `GPT.recompute` runs one block (and may drop its
activations until backward), a `score` computes the loss from the last hidden states in place of logits, and with
sequence parallelism `GPT.shard_positions` gets an all-to-all. Generation hands in key-value caches.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.model import ModelConfig
from megagpt.config.regularization import UNREGULARIZED, Dropout, RegularizationConfig
from megagpt.model.attention import ATTENTION, over_ranks
from megagpt.model.cache import Append, KeyValueCaches
from megagpt.model.layers import Embedding, Linear, Mix, norm
from megagpt.model.loss import Score, capped
from megagpt.model.masks import document_positions, window_mask
from megagpt.model.positions import alibi_mask, rotary_tables, rotate, sinusoidal
from megagpt.model.stochastic_depth import StochasticDepth


class OutputHead(Linear):
    """Returns logits, or a score of hidden states and weight, computed here while ZeRO-3 has the weight gathered."""

    softcap: float | None = None

    def forward(self, x: Tensor, score: Score | None = None) -> Tensor:
        if score is not None:
            return score(x, self.weight, self.softcap)
        return capped(super().forward(x), self.softcap)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2): x (B, T, C) -> (B, T, C).

    With value residual, the first block's attention also returns its values (B, K, T, D), and the others mix them into
    theirs.
    """

    def __init__(self, cfg: ModelConfig, dropout: Dropout, *, first: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = [cfg.n_head, cfg.kv_heads, cfg.kv_heads], cfg.head_dim
        self.attend = self.attend_alone = ATTENTION[cfg.attention]
        self.dropout = dropout
        self.c_attn = Linear(cfg.n_embd, sum(self.heads) * cfg.head_dim, bias=cfg.bias)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, std=residual_std(cfg), bias=cfg.bias)
        self.q_norm = norm(cfg, cfg.head_dim) if cfg.qk_norm else nn.Identity()
        self.k_norm = norm(cfg, cfg.head_dim) if cfg.qk_norm else nn.Identity()
        self.returns_values = cfg.value_residual and first
        self.value_mix = Mix() if cfg.value_residual and not first else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        values: Tensor | None = None,
        cache: Append | None = None,
    ) -> "Output":
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), and (B, K, T, D) each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.value_mix is not None:
            v = self.value_mix(v, values)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        attend, all_v = self.attend, v
        if cache is not None:
            k, all_v = cache(k, v)  # each (B, K, S, D)
            q = q.to(k.dtype)
            # Also with sequence parallelism, because every rank generates whole texts.
            attend = self.attend_alone
        y = attend(q, k, all_v, self.dropout.attention if self.training else 0.0, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)
        y = F.dropout(self.c_proj(y), self.dropout.residual, self.training)
        # A copy, since a view would keep queries and keys alive, too.
        return (y, v.contiguous()) if self.returns_values else y


def _squared(x: Tensor) -> Tensor:
    return x * x  # the backward pass of Tensor.square, a power, takes a CPU several times longer


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: _squared(F.relu(x)),  # So et al. 2021, Primer, section 3
    "swiglu": F.silu,  # of the gate: Shazeer 2020
    "geglu": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """Two linear layers with an activation between them, GPT-2's GELU by default: x (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig, dropout: Dropout) -> None:
        super().__init__()
        self.dropout, self.gated, self.activation = dropout, cfg.gated, ACTIVATIONS[cfg.mlp]
        self.c_fc = Linear(cfg.n_embd, cfg.mlp_inner * (2 if cfg.gated else 1), bias=cfg.bias)
        self.c_proj = Linear(cfg.mlp_inner, cfg.n_embd, std=residual_std(cfg), bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C), or the gate and what it multiplies
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        return F.dropout(self.c_proj(x), self.dropout.residual, self.training)


class Block(nn.Module):
    """A transformer block with LayerNorm at the input of each part (GPT-2, section 2.3): x (B, T, C) -> (B, T, C).

    With value residual (Zhou et al. 2024) the first block also returns its values, and the others get them; with the
    embedding shortcut (Jordan et al. 2024) they get the embeddings (B, T, C). At the start both change nothing.
    """

    def __init__(self, cfg: ModelConfig, dropout: Dropout, *, first: bool = False) -> None:
        super().__init__()
        self.shortcut = Mix() if cfg.embedding_shortcut and not first else None
        self.ln_1 = norm(cfg, cfg.n_embd)
        self.attn = CausalSelfAttention(cfg, dropout, first=first)
        self.ln_2 = norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg, dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        values: Tensor | None = None,
        embeddings: Tensor | None = None,
        *,
        cache: Append | None = None,
    ) -> "Output":
        if self.shortcut is not None:
            x = self.shortcut(x, embeddings)
        y, returned = with_values(self.attn(self.ln_1(x), mask, rotary, values, cache))
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x if returned is None else (x, returned)


Output = Tensor | tuple[Tensor, Tensor]  # of the first block, with value residual, its values, too


def with_values(output: Output) -> tuple[Tensor, Tensor | None]:
    """Return what a block or its attention computed, and the values that it returned, if any."""
    return output if isinstance(output, tuple) else (output, None)


class Recompute(Protocol):
    """Runs block number i on its inputs and keeps its activations for backward, or recomputes them there."""

    def __call__(self, i: int, block: Block, *inputs: Tensor | None) -> Output: ...


def keep_activations(i: int, block: Block, *inputs: Tensor | None) -> Output:
    """Run the block and keep all activations: the policy `none`."""
    return block(*inputs)


class GPT(nn.Module):
    """A decoder-only language model: tokens (B, T) -> logits (B, T, V), V the padded vocabulary; or a score."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, regularization: RegularizationConfig = UNREGULARIZED) -> None:
        super().__init__()
        self.cfg, self.dropout = cfg, regularization.dropouts
        self.stochastic_depth = StochasticDepth(regularization.skip_rates(cfg.n_layer))
        self.wte = Embedding(vocab_size, cfg.n_embd)
        self.wpe = Embedding(cfg.seq_len, cfg.n_embd) if cfg.position == "learned" else None
        self.h = nn.ModuleList(Block(cfg, self.dropout, first=i == 0) for i in range(cfg.n_layer))
        self.ln_f = norm(cfg, cfg.n_embd)
        self.lm_head = OutputHead(cfg.n_embd, vocab_size, std=0.02 if cfg.init == "gpt2" else 0.0, bias=False)
        self.lm_head.softcap = cfg.logit_softcap
        self.tie_output()
        self.recompute: Recompute = keep_activations
        # With sequence parallelism, sequence_size ranks have T positions each, this one those from sequence_rank * T.
        self.sequence_rank, self.sequence_size = 0, 1

    def tie_output(self) -> None:
        """Make the output head's weight the token embedding (Press and Wolf 2017), unless it has its own."""
        if self.cfg.tied:
            self.lm_head.weight = self.wte.weight

    def forward(
        self,
        tokens: Tensor,
        caches: KeyValueCaches | None = None,
        *,
        documents: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or what `score` makes of the last hidden states (B, T, C) and the output matrix.

        With `caches` the tokens continue the texts whose positions are already in them. `documents` (B, T) are numbers
        that change where a document begins: each document is then read as if it stood alone. With sequence parallelism
        they cover the positions of all ranks. Raises ValueError if the positions do not fit seq_len.
        """
        T = tokens.size(1)
        begin = max(caches.lengths) if caches else self.sequence_rank * T
        end = begin + T
        if end > self.cfg.seq_len:
            raise ValueError(f"position {end} does not fit the model's {self.cfg.seq_len} positions")
        positions, mask = torch.arange(begin, end, device=tokens.device), None  # (T,)
        if documents is not None:
            positions, mask = document_positions(documents)
            positions = positions[:, begin:end]  # (B, T)
        if caches is not None:
            positions, mask = caches.next(T)
        x = F.dropout(self._embedded(tokens, positions), self.dropout.embedding, self.training)  # (B, T, C)
        rotary = None
        if self.cfg.position == "rotary":
            rotary = rotary_tables(positions, self.cfg.head_dim, self.cfg.rotary_base, self.cfg.rotary_scaling)
        if caches is None:
            whole = T * self.sequence_size
            masks = self._masks(mask, torch.arange(whole, device=tokens.device), whole)
        else:
            masks = self._masks(mask, positions, end)
        recompute = self.recompute if self.training else keep_activations
        kept = self.stochastic_depth.draw(len(x), x.device) if self.training else None
        # A view has a node of its own in the graph, so that gradients are summed in one order, whoever recomputes.
        embeddings = x.view_as(x) if self.cfg.embedding_shortcut else None
        values: Tensor | None = None
        for i, block in enumerate(self.blocks()):
            if caches is None:
                output = recompute(i, block, x if kept is None else x.view_as(x), masks[i], rotary, values, embeddings)
            else:
                output = block(x, masks[i], rotary, values, embeddings, cache=partial(caches.append, i))
            y, returned = with_values(output)
            values = values if returned is None else returned
            x = self.stochastic_depth.after(i, x, y, kept)  # (B, T, C)
        if caches is not None:
            caches.advance(T)
        return self.lm_head(self.ln_f(x), score)  # (B, T, V)

    def _masks(self, mask: Tensor | None, places: Tensor, n_keys: int) -> list[Tensor | None]:
        """Return each block's mask, where queries at these places may see what `mask` (None: causal) lets them."""
        found: dict[int | None, Tensor | None] = {}
        for window in set(self.cfg.windows):
            found[window] = mask if window is None else window_mask(places, n_keys, window, mask)
            if self.cfg.position == "alibi":
                found[window] = alibi_mask(self.cfg.n_head, places, n_keys, found[window])
        return [found[window] for window in self.cfg.windows]

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the embeddings of tokens (B, T), with those of their positions where these are added: (B, T, C)."""
        x: Tensor = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        elif self.cfg.position == "sinusoidal":
            x = x + sinusoidal(positions, self.cfg.n_embd).to(x.dtype)
        return x

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in order, with their type."""
        for block in self.h:
            assert isinstance(block, Block)
            yield block

    def shard_positions(self, exchange: Callable[[Tensor], Tensor], size: int, sequence_rank: int) -> None:
        """Let `size` ranks, of which this is one, compute a share of each sample's positions; see `over_ranks`."""
        for block in self.blocks():
            block.attn.attend = over_ranks(block.attn.attend, exchange, size)
        self.stochastic_depth.same = lambda x: exchange(x.expand(size, *x.shape).contiguous())[0]
        self.sequence_rank, self.sequence_size = sequence_rank, size

    def new_caches(self, batch: int, positions: int | None = None) -> KeyValueCaches:
        """Return empty key-value caches for `batch` texts of `positions` each; default: all that the model has."""
        cfg, like = self.cfg, self.wte.weight
        shape = (cfg.n_layer, 2, batch, cfg.kv_heads, positions or cfg.seq_len, cfg.head_dim)
        # The attention of one position takes a CPU many times longer in 16 bits.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        return KeyValueCaches(torch.zeros(shape, dtype=dtype, device=like.device))


def residual_std(cfg: ModelConfig) -> float:
    """Return the smaller std of the 2 * n_layer projections that add to the residual stream (GPT-2, section 2.3)."""
    return 0.0 if cfg.init == "zero_out" else 0.02 / math.sqrt(2 * cfg.n_layer)
