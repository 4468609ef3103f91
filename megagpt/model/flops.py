"""Count parameters and FLOPs in closed form from the model's sizes: under ZeRO-3 a parameter's own size is 0.

N parameters without tables that are only looked up, L n_layer, C n_embd, T seq_len, V vocab_size.
"""

from megagpt.config.model import ModelConfig
from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import NO_DROPOUT, Dropout


def param_sizes(cfg: ModelConfig, vocab_size: int) -> list[int]:
    """Return the number of elements of each parameter, in the model's order; a tied head is the first."""
    C = cfg.n_embd
    norm, head_norms = _norm(cfg, C), 2 * _norm(cfg, cfg.head_dim) if cfg.qk_norm else []
    c_attn, c_proj, c_fc, mlp_c_proj = ([i * o, o] if cfg.bias else [i * o] for i, o in _linears(cfg))
    mixes = [2] * (cfg.value_residual + cfg.embedding_shortcut)  # of all blocks but the first
    block = [*norm, *c_attn, *c_proj, *head_norms, *norm, *c_fc, *mlp_c_proj]
    positions = [cfg.seq_len * C] if cfg.position == "learned" else []
    blocks = [*block, *[*mixes, *block] * (cfg.n_layer - 1)]
    return [vocab_size * C, *positions, *blocks, *norm, *([] if cfg.tied else [vocab_size * C])]


def _linears(cfg: ModelConfig) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a block's linear layers."""
    C, inner = cfg.n_embd, cfg.mlp_inner
    return [(C, _qkv(cfg)), (C, C), (C, inner * (2 if cfg.gated else 1)), (inner, C)]


def _qkv(cfg: ModelConfig) -> int:
    """Return the width of queries, keys and values of all heads."""
    return cfg.n_embd + 2 * cfg.kv_heads * cfg.head_dim


def _norm(cfg: ModelConfig, width: int) -> list[int]:
    return {"layernorm": [width] * (1 + cfg.bias), "rmsnorm": [width], "rmsnorm_unweighted": []}[cfg.norm]


def n_params(cfg: ModelConfig, vocab_size: int) -> int:
    """Return the number of trained parameters; the tied head counts once."""
    return sum(param_sizes(cfg, vocab_size))


def n_hidden(cfg: ModelConfig) -> int:
    """Return the number of parameters in the blocks' matrices, which Muon updates."""
    return cfg.n_layer * sum(i * o for i, o in _linears(cfg))


def hidden_matrices(cfg: ModelConfig) -> list[tuple[int, int]]:
    """Return (rows, columns) of the matrices of a block that Muon orthogonalizes: queries, keys, ... each by itself."""
    C, inner, heads = cfg.n_embd, cfg.mlp_inner, (cfg.n_head, cfg.kv_heads, cfg.kv_heads)
    attention = [(n * cfg.head_dim, C) for n in heads] + [(C, C)]
    return [*attention, *[(inner, C)] * (2 if cfg.gated else 1), (C, inner)]


def n_vector_elements(cfg: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters in biases, norms and scalars, which do not decay by default."""
    tables = [cfg.seq_len] * (cfg.position == "learned") + [vocab_size] * (1 if cfg.tied else 2)  # their rows
    return n_params(cfg, vocab_size) - sum(tables) * cfg.n_embd - n_hidden(cfg)


def bucket_elements(cfg: ModelConfig, vocab_size: int, world_size: int) -> int:
    """Return how many gradient elements DeepSpeed reduces at once, if the run file sets no bucket size.

    That is an eighth of the model, so that reducing overlaps with backward, but at least its largest parameter and at
    most 50 million. One rank has nothing to reduce: its bucket is as small as possible.
    """
    largest = max(param_sizes(cfg, vocab_size))
    return min(largest if world_size == 1 else max(largest, n_params(cfg, vocab_size) // 8), 50_000_000)


def attended(cfg: ModelConfig) -> float:
    """Return twice the positions that a token attends to on average, summed over the blocks: T for a whole sequence."""
    T = cfg.seq_len
    return sum(T if window is None or window >= T else window * (2 - window / T) for window in cfg.windows)


def flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of forward and backward, without windows 6 N + 12 L C T (Chowdhery et al. 2022, appendix B)."""
    looked_up = [cfg.seq_len] * (cfg.position == "learned") + [vocab_size] * (not cfg.tied)  # rows of these tables
    n = n_params(cfg, vocab_size) - sum(looked_up) * cfg.n_embd
    return 6 * n + 12 * cfg.n_embd * attended(cfg)


def causal_flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Return the same with the half of attention that a causal kernel computes: 6 N + 6 L C T."""
    return flops_per_token(cfg, vocab_size) - 6 * cfg.n_embd * attended(cfg)


def recompute_flops_per_token(
    cfg: ModelConfig,
    recompute: RecomputeConfig,
    *,
    dropout: Dropout = NO_DROPOUT,
    zero3: bool = False,
    compiled: bool = False,
) -> float | None:
    """Return the FLOPs that activation checkpointing recomputes: hfu counts them, mfu does not.

    None if the compiler decides. torch stops recomputing a block at the last tensor that backward needs: the input of
    mlp.c_proj; with dropout of residuals, the mask after its output; with DeepSpeed's linear layer of ZeRO-3, which
    saves its input late, that output. DeepSpeed's checkpointing and compiled blocks recompute to the end of the block,
    except where the compiler itself carries out a policy.
    """
    if recompute.policy == "budget":
        return None
    C = cfg.n_embd
    c_attn, attention, c_proj = 2 * C * _qkv(cfg), 4 * C * attended(cfg) / cfg.n_layer, 2 * C * C
    mlp = 2 * C * cfg.mlp_inner  # of a matrix from or to that width
    c_fc = mlp * (2 if cfg.gated else 1)
    to_the_end = recompute.kind == "deepspeed" or dropout.residual > 0.0 or zero3 or compiled
    mlp_c_proj = mlp if to_the_end and not (compiled and recompute.policy == "selective") else 0
    if recompute.policy == "selective":  # keeps the outputs that recompute.py chooses
        c_attn = c_fc = 0
        attention = attention if dropout.attention > 0.0 or cfg.attention == "eager" else 0
    return recompute.n_blocks(cfg.n_layer) * (c_attn + attention + c_proj + c_fc + mlp_c_proj)
