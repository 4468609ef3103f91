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


def as_gpt2(weights: dict[str, Tensor], vocab_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return GPT2LMHeadModel's tensors: the tied output head once, and no rows that only pad the vocabulary."""
    named = {}
    for name, weight in weights.items():
        if name != HEAD:
            weight = weight[:vocab_size] if name == EMBEDDING else weight
            weight = weight.T if name.endswith(TRANSPOSED) else weight
            named[f"transformer.{name}"] = weight.to(dtype).contiguous()
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


def write_weights(named: dict[str, Tensor], folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one file, or several with their index where all together are larger than shard_bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in named.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
