"""Weights and configuration as a class of transformers has them: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.

They are written as safetensors. For GPT-2 transformers keeps OpenAI's Conv1D: its matrices are (inputs, outputs), the
transpose of a linear layer's.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagpt.config.model import ModelConfig
from megagpt.config.regularization import Dropout
from megagpt.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9  # transformers' own default once
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"


# Classes of transformers -> the choices of ModelConfig that they compute.
NOT_THERE = {"logit_softcap": None, "value_residual": False, "embedding_shortcut": False, "sliding_window": None}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, **NOT_THERE}
CLASSES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {key: ModelConfig.model_fields[key].default for key in (*LLAMA, "qk_norm", "n_kv_head")},
    "LlamaForCausalLM": LLAMA | {"qk_norm": False},
    "Qwen3ForCausalLM": LLAMA | {"qk_norm": True},
}


def class_of(cfg: ModelConfig) -> str:
    """Return the class of transformers that computes such a model. Raises UserError if there is none."""
    lacks = {name: [key for key in keys if getattr(cfg, key) != keys[key]] for name, keys in CLASSES.items()}
    name = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[name]:
        found = ", ".join(f"megagpt.model.{key}={getattr(cfg, key)}" for key in lacks[name])
        raise UserError(
            f"no class of transformers computes a model with {found}; one of megagpt.model.preset=gpt2 or llama can be "
            "exported, and generate, evaluate and megagpt.load use this one"
        )
    return name


class Architecture(NamedTuple):
    """Names an architecture of transformers."""

    causal_lm: str  # its class
    title: str
    prefix: str  # of tensors that the class without an output head has too


ARCHITECTURES = {  # by the model_type of config.json
    "gpt2": Architecture("GPT2LMHeadModel", "GPT-2", "transformer."),
    "llama": Architecture("LlamaForCausalLM", "Llama", "model."),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3", "model."),
}


def model_type(cfg: ModelConfig) -> str:
    """Return the name of that class's architecture: gpt2, llama or qwen3."""
    name = class_of(cfg)
    return next(kind for kind, architecture in ARCHITECTURES.items() if architecture.causal_lm == name)


def renamed(weights: dict[str, Tensor], cfg: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Return the tensors of the transformers class: a tied output head once, no rows that only pad the vocabulary.

    They are views of the given ones: nothing is copied.
    """
    kept = {name: weight for name, weight in weights.items() if name != HEAD or not cfg.tied}
    kept |= {name: kept[name][:vocab_size] for name in (EMBEDDING, HEAD) if name in kept}
    named: dict[str, Tensor] = {}
    for name, weight in kept.items():
        rows = stored_rows(name, cfg, len(weight))
        parts = weight.split(list(rows.values()))
        named |= {
            theirs: part.T if is_transposed(name, cfg) else part for theirs, part in zip(rows, parts, strict=True)
        }
    return named


def is_transposed(name: str, cfg: ModelConfig) -> bool:
    """Tell whether the class has the transpose of our tensor `name`."""
    return model_type(cfg) == "gpt2" and name.endswith(TRANSPOSED)


def stored_rows(name: str, cfg: ModelConfig, n_rows: int) -> dict[str, int]:
    """Return the names of the class's tensors that together are our tensor `name`, and how many of its rows each has.

    What our model computes in one product is several tensors of Llama: queries, keys and values, and the MLP's gate and
    input.
    """
    if model_type(cfg) == "gpt2":
        return {name if name == HEAD else f"transformer.{name}": n_rows}
    if name in LLAMA_ENDS:
        return {LLAMA_ENDS[name]: n_rows}
    number, _, part = name.removeprefix("h.").partition(".")
    block = f"model.layers.{number}."
    if part == "attn.c_attn.weight":
        heads = {"q": cfg.n_head, "k": cfg.kv_heads, "v": cfg.kv_heads}
        return {f"{block}self_attn.{letter}_proj.weight": n * cfg.head_dim for letter, n in heads.items()}
    if part == "mlp.c_fc.weight":
        return {f"{block}mlp.{kind}_proj.weight": cfg.mlp_inner for kind in ("gate", "up")}
    return {block + LLAMA_PARTS[part]: n_rows}


LLAMA_ENDS = {EMBEDDING: "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight", HEAD: HEAD}
LLAMA_PARTS = {  # of a block
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def config_json(cfg: ModelConfig, vocab_size: int, eod_id: int, dropout: Dropout, dtype: str) -> dict[str, Any]:
    """Return config.json. The end-of-document token begins each document, and so is the beginning-of-text token."""
    kind = model_type(cfg)
    return {
        "architectures": [class_of(cfg)],
        "model_type": kind,
        "vocab_size": vocab_size,
        **(_gpt2_sizes(cfg, dropout) if kind == "gpt2" else _llama_sizes(cfg, dropout)),
        "initializer_range": 0.02,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }


def _gpt2_sizes(cfg: ModelConfig, dropout: Dropout) -> dict[str, Any]:
    return {
        "n_positions": cfg.seq_len,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None if cfg.mlp_inner == 4 * cfg.n_embd else cfg.mlp_inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": cfg.norm_eps,
        "resid_pdrop": dropout.residual,
        "embd_pdrop": dropout.embedding,
        "attn_pdrop": dropout.attention,
        "scale_attn_weights": True,
    }


def _llama_sizes(cfg: ModelConfig, dropout: Dropout) -> dict[str, Any]:
    """Return Llama's and Qwen3's keys, the base of rotary positions as transformers 4 and 5 read it."""
    scaled = cfg.rotary_scaling != 1.0
    scaling = {"rope_type": "linear", "factor": cfg.rotary_scaling} if scaled else {"rope_type": "default"}
    return {
        "max_position_embeddings": cfg.seq_len,
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.mlp_inner,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rotary_base,
        "rope_scaling": scaling if scaled else None,
        "rope_parameters": {**scaling, "rope_theta": cfg.rotary_base},
        "attention_bias": False,
        "attention_dropout": dropout.attention,
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
