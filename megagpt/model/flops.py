"""Count parameters and FLOPs in closed form from the model's sizes: under ZeRO-3 a parameter's own size is 0.

N parameters without the position table, L n_layer, C n_embd, T seq_len, V vocab_size.
"""

from megagpt.config.schema import ModelConfig, RecomputeConfig


def param_sizes(cfg: ModelConfig, vocab_size: int) -> list[int]:
    """Return the number of elements of each parameter, in the model's order; the tied head is the first."""
    C = cfg.n_embd
    block = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    return [vocab_size * C, cfg.seq_len * C, *block * cfg.n_layer, C, C]


def n_params(cfg: ModelConfig, vocab_size: int) -> int:
    """Return the number of trained parameters; the tied head counts once."""
    return sum(param_sizes(cfg, vocab_size))


def bucket_elements(cfg: ModelConfig, vocab_size: int, world_size: int) -> int:
    """Return how many gradient elements DeepSpeed reduces at once, if the run file sets no bucket size.

    That is an eighth of the model, so that reducing overlaps with backward, but at least its largest parameter and at
    most 50 million. One rank has nothing to reduce: its bucket is as small as possible.
    """
    largest = max(param_sizes(cfg, vocab_size))
    return min(largest if world_size == 1 else max(largest, n_params(cfg, vocab_size) // 8), 50_000_000)


def flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B)."""
    n = n_params(cfg, vocab_size) - cfg.seq_len * cfg.n_embd
    return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def causal_flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Return the same with the half of attention that a causal kernel computes: 6 N + 6 L C T."""
    return flops_per_token(cfg, vocab_size) - 6 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def recompute_flops_per_token(
    cfg: ModelConfig, recompute: RecomputeConfig, *, dropout: float = 0.0, zero3: bool = False, compiled: bool = False
) -> float | None:
    """Return the FLOPs that activation checkpointing recomputes: hfu counts them, mfu does not.

    None if the compiler decides. torch stops recomputing a block at the last tensor that backward needs: the input of
    mlp.c_proj; with dropout, the mask after its output; with DeepSpeed's linear layer of ZeRO-3, which saves its input
    late, that output. DeepSpeed's checkpointing and compiled blocks recompute to the end of the block, except where
    the compiler itself carries out a policy.
    """
    if recompute.policy == "budget":
        return None
    C = cfg.n_embd
    c_attn, attention, c_proj, c_fc = 6 * C * C, 4 * C * cfg.seq_len, 2 * C * C, 8 * C * C
    to_the_end = recompute.kind == "deepspeed" or dropout > 0.0 or zero3 or compiled
    mlp_c_proj = 8 * C * C if to_the_end and not (compiled and recompute.policy == "selective") else 0
    if recompute.policy == "selective":  # keeps the outputs that recompute.py chooses
        c_attn = c_fc = 0
        attention = attention if dropout > 0.0 or cfg.attention == "eager" else 0
    return recompute.n_blocks(cfg.n_layer) * (c_attn + attention + c_proj + c_fc + mlp_c_proj)
