"""Read the tokenizer of a Hugging Face folder: a tokenizer.json, GPT-2's two older files, or a SentencePiece model."""

import json
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.git_pointers import MOST_POINTER, pointer_instead_of
from megagpt.huggingface.packages import check_installed
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.tokenizer.tokenizer_file import TOKENIZER_JSON

SENTENCEPIECE = ("tokenizer.model", "spiece.model")
OLDER = ("vocab.json", "merges.txt")
SPACE = "\u0120"  # how GPT-2's vocabulary spells it
MOST_UNUSED = 1024  # rows of the embeddings without a token: vocabularies are padded to multiples of up to that


def read_tokenizer(source: Path, n_rows: int) -> Tokenizer:
    """Return the tokenizer of a model with n_rows embeddings. Raises UserError if there is none, or another model's."""
    tokenizer = _found(source)
    tokens, unused = tokenizer.vocab_size, n_rows - tokenizer.vocab_size
    if unused < 0:
        without = [name for name in tokenizer.names()[n_rows:] if name]
        raise UserError(
            f"the tokenizer of {source} does not match its model: it has {tokens:,} tokens, and the model embeddings "
            f"of {n_rows:,}, none of {', '.join(without[:4])}; put the model's own tokenizer there, or remove these "
            "from added_tokens"
        )
    if unused >= MOST_UNUSED:
        raise UserError(
            f"the tokenizer of {source} does not match its model: it has {tokens:,} tokens, and the model embeddings "
            f"of {n_rows:,}; put the model's own tokenizer there"
        )
    return tokenizer


def _found(source: Path) -> Tokenizer:
    for name in (TOKENIZER_JSON, *SENTENCEPIECE):
        if (source / name).is_file():
            return Tokenizer.load(source / name)
    if all((source / name).is_file() for name in OLDER):
        return _converted(source)
    raise UserError(
        f"{source} has no tokenizer: no {TOKENIZER_JSON}, no {' and '.join(OLDER)} and no {SENTENCEPIECE[0]}; copy "
        "it from where the model came from"
    )


def _converted(source: Path) -> Tokenizer:
    """Convert vocab.json and merges.txt as transformers does."""
    check_installed(f"the tokenizer of {source}, in {' and '.join(OLDER)},", "transformers", "tokenizers")
    for name in OLDER:
        with (source / name).open("rb") as file:
            if message := pointer_instead_of(str(source / name), file.read(MOST_POINTER)):
                raise UserError(message)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    gpt2 = import_module("transformers").GPT2TokenizerFast
    with tempfile.TemporaryDirectory() as name:
        converted = Path(name) / TOKENIZER_JSON
        try:
            gpt2.from_pretrained(source).save_pretrained(name)
        except Exception as error:  # of many kinds
            raise UserError(
                f"transformers cannot read the tokenizer of {source}: {error!s:.300}; fetch it again"
            ) from error
        if piece := _not_made(json.loads(converted.read_bytes())["model"]):
            raise UserError(f"{source / OLDER[1]} is cut off: none of its merges makes {piece!r}; fetch it again")
        return Tokenizer.load(converted)


def _not_made(model: dict[str, Any]) -> str | None:
    """Return a piece that begins with a space, as no special token does, and that no merge makes."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = {"".join(pair) for pair in pairs}
    return next(
        (piece for piece in model["vocab"] if piece.startswith(SPACE) and len(piece) > 1 and piece not in made), None
    )
