"""Small GPT-2 folders as transformers saves them, with random weights and a byte-level tokenizer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers_of_others import write_json

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 330}  # as the tokenizer has


def gpt2(*, std: float = 0.2, **config: Any) -> "GPT2LMHeadModel":
    """A model in which every tensor matters: transformers begins with biases of 0 and norms of 1."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **config}))
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
