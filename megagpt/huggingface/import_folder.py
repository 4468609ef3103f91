"""Make a folder to begin from out of a Hugging Face folder, with its model's weights, shape and tokenizer."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.checkpoint.weights_folder import write_weights_folder
from megagpt.config.model import ModelConfig
from megagpt.huggingface.read_config import Config, read_config
from megagpt.huggingface.read_tokenizer import read_tokenizer
from megagpt.huggingface.read_weights import read_weights
from megagpt.huggingface.weights import EMBEDDING, HEAD
from megagpt.new_folder import check_free
from megagpt.tokenizer.tokenizer import Tokenizer, padded_vocab_size
from megagpt.train_state import TrainState


class Imported(NamedTuple):
    """Holds what was imported."""

    model: ModelConfig
    tokenizer: Tokenizer
    notes: list[str]


def import_folder(source: Path, folder: Path, *, pickles: bool) -> Imported:
    """Write `folder`, which must be new or empty. Raises UserError; nothing is left behind then."""
    config = read_config(source)
    check_free(folder)
    model, n_rows = config.model, config.vocab_size
    tokenizer = read_tokenizer(source, n_rows)
    weights = read_weights(source, model, n_rows, tied=config.tied, pickles=pickles)
    vocab_size = padded_vocab_size(tokenizer.vocab_size)
    weights |= {name: padded(weights[name], vocab_size) for name in (EMBEDDING, HEAD) if name in weights}
    if HEAD in weights:
        model = model.model_copy(update={"tied": False})
    shape = model.identity()
    write_weights_folder(
        folder,
        weights,
        tokenizer,
        model=shape,
        vocab_size=vocab_size,
        run_file={"megagpt": {"model": shape}},
        kind="import",
        sources={"folder": str(source.absolute())},
        state=TrainState(),
    )
    return Imported(model, tokenizer, _notes(tokenizer, vocab_size, config))


def padded(embedding: Tensor, n_rows: int) -> Tensor:
    """Return the embedding with n_rows rows. Those that it lacks are the mean of its own (Hewitt 2021).

    In the output head, the same matrix or padded alike, their logits are the mean of the others': of n tokens, k more
    such rows raise no loss by more than log(1 + k / n) nats. Rows of zeros would have the logit 0, and those of GPT-2
    are near -100.
    """
    own = embedding[:n_rows]
    mean = own.mean(0, keepdim=True, dtype=torch.float32).to(own.dtype)
    return torch.cat([own, mean.expand(n_rows - len(own), -1)])


def _notes(tokenizer: Tokenizer, vocab_size: int, config: Config) -> list[str]:
    notes, names, eod_id = [], tokenizer.names(), tokenizer.eod_id
    if config.vocab_size > vocab_size:
        notes.append(
            f"note: {config.vocab_size - vocab_size:,} embeddings, which no token of its tokenizer has, are left out"
        )
    if config.eos_id not in (None, eod_id) and config.eos_id < tokenizer.vocab_size:
        notes.append(
            f"note: config.json names token {config.eos_id} ({names[config.eos_id]}) as the end of a text, and the "
            f"tokenizer {eod_id} ({names[eod_id]}), which is used"
        )
    if config.bos_id not in (None, eod_id) and config.bos_id < tokenizer.vocab_size:
        notes.append(
            f"note: config.json names token {config.bos_id} ({names[config.bos_id]}) as the beginning of a text; here "
            f"each begins with {eod_id} ({names[eod_id]}), in training, evaluation and generation"
        )
    return notes
