"""Small tokenizers as Hugging Face's `tokenizers` trains and saves them: the parsed tokenizer.json of each kind."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from data_support import document
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [document(i) for i in range(50)] + ["Caf\u00e9 \u4e2d\u6587 \U0001f600 it's 1234\n\n"] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gpt2() -> Tokenizer:
    """A byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=330, **options))
    return made


def llama() -> Tokenizer:
    """Llama's BPE: spaces as U+2581, one before the text, bytes for what has no piece, and <s> before each text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(spaces)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    options = {"special_tokens": special, "show_progress": False, "max_token_length": 8}
    lines = [line for text in LINES for line in text.splitlines()]
    made.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=380, **options))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram() -> Tokenizer:
    """A Unigram model that has no piece for most letters, and pieces that are the names of its control tokens."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>", "show_progress": False}
    made.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=120, **options))
    return made


KINDS = {"gpt2": gpt2, "llama": llama, "unigram": unigram}


@cache
def _json_of(kind: str) -> str:
    spec = json.loads(KINDS[kind]().to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(spec, ensure_ascii=False)


def json_of(kind: str) -> dict[str, Any]:
    """A fresh copy, to be changed."""
    spec: dict[str, Any] = json.loads(_json_of(kind))
    return spec


def write_json(folder: Path, kind: str, **changes: Any) -> Path:
    """Write tokenizer.json with some sections changed; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json_of(kind) | changes, ensure_ascii=False), encoding="utf-8")
    return path


def of_the_package(path: Path) -> Tokenizer:
    """The package's own reading of a file, where names of control tokens in a text are text."""
    found: Tokenizer = tokenizers.Tokenizer.from_file(str(path))
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True
    return found
