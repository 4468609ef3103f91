"""Weights and configuration of GPT-2 as transformers' GPT2LMHeadModel has them, written as safetensors.

transformers keeps OpenAI's Conv1D: its matrices are (inputs, outputs), the transpose of a linear layer's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagpt.config.schema import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9  # transformers' own default once
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"


def as_gpt2(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Return GPT2LMHeadModel's tensors: the tied output head once, and no rows that only pad the vocabulary.

    They are views of the given ones: nothing is copied.
    """
    named = {}
    for name, weight in weights.items():
        if name != HEAD:
            weight = weight[:vocab_size] if name == EMBEDDING else weight
            named[f"transformer.{name}"] = weight.T if name.endswith(TRANSPOSED) else weight
    return named


def gpt2_config(cfg: ModelConfig, vocab_size: int, eod_id: int, dropout: float, dtype: str) -> dict[str, Any]:
    """Return config.json. The end-of-document token begins each document, and so is the beginning-of-text token."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": cfg.seq_len,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }


def write_weights(
    named: dict[str, Tensor], folder: Path, dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write one file, or several with their index where all together are larger than shard_bytes.

    Memory holds a copy of one file's tensors at a time.
    """
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in named.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(map(sizes.__getitem__, shards[-1])) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        save_file({name: named[name].to(dtype).contiguous() for name in names}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
