"""Parameters, FLOPs and MFU in closed form from the model's sizes: under ZeRO-3 a parameter cannot be counted.

N parameters without the position table, L n_layer, C n_embd, T seq_len, V vocab_size.
"""

from megagpt.config import ModelConfig

# Dense bf16 peak in FLOP/s, from the vendors' data sheets (without sparsity). First match of the device's name wins.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def n_params(cfg: ModelConfig, vocab_size: int) -> int:
    """All trained numbers; the tied head counts once."""
    C = cfg.n_embd
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 2 * (2 * C)
    return vocab_size * C + cfg.seq_len * C + cfg.n_layer * block + 2 * C


def flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """Forward and backward: 6 N + 12 L C T, attention counted in full (Chowdhery et al. 2022, PaLM, appendix B)."""
    n = n_params(cfg, vocab_size) - cfg.seq_len * cfg.n_embd
    return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def causal_flops_per_token(cfg: ModelConfig, vocab_size: int) -> float:
    """The same with half the attention, the half that a causal kernel computes: 6 N + 6 L C T."""
    return flops_per_token(cfg, vocab_size) - 6 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def recompute_flops_per_token(cfg: ModelConfig, n_blocks: int) -> float:
    """What computing n_blocks' forward pass once more adds: hfu counts it, mfu does not."""
    C = cfg.n_embd
    return n_blocks * (2 * 12 * C * C + 4 * C * cfg.seq_len)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device, or None: an unknown device gets no MFU rather than a guess."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
