"""A small model of any choice of parts, and tokens for it."""

import torch

from megagpt.config.model import ModelConfig
from megagpt.model.gpt import GPT

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 48, "seq_len": 24}
VOCAB = 128
TOKENS = torch.arange(1, 25).view(1, 24) * 5 % VOCAB


def model_of(choice: dict, *, seed: int = 0) -> GPT:
    """A model whose weights are all random: zeros and ones would hide an exchange."""
    model = GPT(ModelConfig(**SIZES, **choice), VOCAB)
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.2)
    return model
