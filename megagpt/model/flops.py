"""Parameters, FLOPs and MFU in closed form from the model's sizes: under ZeRO-3 a parameter cannot be counted.

N parameters without the position table, L n_layer, C n_embd, T seq_len, V vocab_size.
"""

from megagpt.config.schema import ModelConfig, RecomputeConfig


def param_sizes(cfg: ModelConfig, vocab_size: int) -> list[int]:
    """Elements of each parameter, in the model's order; the tied head is the first."""
    C = cfg.n_embd
    block = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    return [vocab_size * C, cfg.seq_len * C, *block * cfg.n_layer, C, C]


def n_params(cfg: ModelConfig, vocab_size: int) -> int:
    """All trained numbers; the tied head counts once."""
    return sum(param_sizes(cfg, vocab_size))


def bucket_elements(cfg: ModelConfig, vocab_size: int, world_size: int) -> int:
    """Gradients that are reduced at a time, where the run file does not say: an eighth of the model, so that there is
    something to overlap, at least its largest parameter, at most 50 million. On one rank there is nothing to reduce.
    """
    largest = max(param_sizes(cfg, vocab_size))
    return min(largest if world_size == 1 else max(largest, n_params(cfg, vocab_size) // 8), 50_000_000)


def flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Forward and backward: 6 N + 12 L C T, attention counted in full (Chowdhery et al. 2022, PaLM, appendix B)."""
    n = n_params(cfg, vocab_size) - cfg.seq_len * cfg.n_embd
    return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def causal_flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """The same with half the attention, the half that a causal kernel computes: 6 N + 6 L C T."""
    return flops_per_token(cfg, vocab_size) - 6 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def recompute_flops_per_token(
    cfg: ModelConfig, recompute: RecomputeConfig, *, dropout: float = 0.0, zero3: bool = False, compiled: bool = False
) -> float | None:
    """What activation checkpointing computes once more: hfu counts it, mfu does not. None: the compiler decides.

    torch stops computing again at the last tensor that backward needs. That is mlp.c_proj's input; with dropout the
    mask behind its output; with DeepSpeed's linear layer of ZeRO-3, which saves its input late, that output.
    DeepSpeed's checkpointing and compiled blocks run to their end, but where the compiler itself carries a policy out.
    """
    if recompute.policy == "budget":
        return None
    C = cfg.n_embd
    c_attn, attention, c_proj, c_fc = 6 * C * C, 4 * C * cfg.seq_len, 2 * C * C, 8 * C * C
    to_the_end = recompute.kind == "deepspeed" or dropout > 0.0 or zero3 or compiled
    mlp_c_proj = 8 * C * C if to_the_end and not (compiled and recompute.policy == "selective") else 0
    if recompute.policy == "selective":  # as recompute.py chooses
        c_attn = c_fc = 0
        attention = attention if dropout > 0.0 or cfg.attention == "eager" else 0
    return recompute.n_blocks(cfg.n_layer) * (c_attn + attention + c_proj + c_fc + mlp_c_proj)
