"""Parameters, FLOPs and MFU in closed form from the model's sizes: under ZeRO-3 a parameter cannot be counted.

N parameters without the position table, L n_layer, C n_embd, T seq_len, V vocab_size.
"""

import re
from dataclasses import dataclass

from megagpt.config.schema import ModelConfig, RecomputeConfig


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s (without sparsity), GiB, GB/s to its neighbors each way."""

    peak_flops: float
    memory_gib: float
    link_gb_s: float  # NVLink where it has one, else PCI Express


# By words of the name that torch.cuda.get_device_name gives; the first whose words are all in it wins. Peaks are
# those of NVIDIA's data sheets; memory (what the driver shows) and links (one way) were not looked up there again.
GPUS = {
    "B200": Gpu(2250e12, 178, 900),
    "H200": Gpu(989e12, 139, 450),
    "H100 PCIe": Gpu(756e12, 79, 64),
    "H100 NVL": Gpu(835e12, 93, 300),
    "H100": Gpu(989e12, 79, 450),
    "A100 40GB": Gpu(312e12, 39, 300),
    "A100": Gpu(312e12, 79, 300),
    "L40S": Gpu(362e12, 44, 32),
    "A10G": Gpu(70e12, 22, 32),
    "RTX 4090": Gpu(165e12, 23, 32),
    "RTX 3090": Gpu(71e12, 23, 32),
    "V100 16GB": Gpu(125e12, 15, 150),
    "V100": Gpu(125e12, 31, 150),
}


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


def gpu_named(device_name: str) -> str | None:
    """The key in GPUS, or None: an unknown device gets no figures rather than a guess."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    return next((name for name in GPUS if words.issuperset(name.lower().split())), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device, if it is known."""
    name = gpu_named(device_name)
    return None if name is None else GPUS[name].peak_flops
