"""Small folders of GPT-2, Llama and Qwen3 as transformers saves them: random weights, a byte-level tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers_of_others import write_json

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 330}  # as the tokenizer has
LLAMA_SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "vocab_size": 330,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def gpt2(*, std: float = 0.2, **config: Any) -> "GPT2LMHeadModel":
    """A model in which every tensor matters: transformers begins with biases of 0 and norms of 1."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return drawn(GPT2LMHeadModel(GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **config})), std)


def llama(kind: str = "llama", *, std: float = 0.2, **config: Any) -> "PreTrainedModel":
    """A Llama or Qwen3 whose queries share heads of keys."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**LLAMA_SIZES, **config}))
    return drawn(made, std)


def drawn(model: Any, std: float) -> Any:
    """The model with random weights, as one that is not trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.normal(0.0, std, weight.shape, generator=generator))
    return model.eval()


def write_tokenizer(folder: Path, kind: str = "gpt2", end: str = "<|endoftext|>") -> None:
    write_json(folder, kind)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))


def write_gpt2(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> "GPT2LMHeadModel":
    """Save a model with its tokenizer; returns the model."""
    model = gpt2(**config).to(dtype)
    write_tokenizer(folder)
    model.save_pretrained(folder)
    return model


def write_llama(
    folder: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, shards: str = "1GB", **config: Any
) -> "PreTrainedModel":
    """Save a model with its tokenizer; returns the model."""
    model = llama(kind, **config).to(dtype)
    write_tokenizer(folder)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def changed_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return rewrite


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])
