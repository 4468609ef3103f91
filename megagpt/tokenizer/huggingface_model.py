"""A Hugging Face tokenizer.json as a model of Tokenizer: encodes by the `tokenizers` package, decodes by itself."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from megagpt.errors import UserError
from megagpt.tokenizer.segment_cache import SegmentEncoder, cuts_before_spaces
from megagpt.tokenizer.tokenizer_json import TokenizerJson

# Builds have a process for each core already, and a pool of threads does not survive a fork.
SETTING = "TOKENIZERS_PARALLELISM"


class HuggingFaceModel:
    """A model that encodes and decodes. Raises UserError for a file that cannot be used."""

    byte_errors = "replace"  # how `decode` shows bytes that are no character

    def __init__(self, model_bytes: bytes, name: str) -> None:
        self._name = name
        self._file, self._fast = _read(model_bytes, name)
        file = self._file
        self.kind, self.normalizer, self.normalizes = file.kind, file.normalizer, file.normalizes
        self.tokenizer_json: str = file.text
        self.vocab_size, self.eod_id, self.unknown_id = len(file.names), file.eod_id, file.unknown_id
        self.is_lossless = self.is_exact_in_parts = file.is_lossless
        self._segments = SegmentEncoder(cuts_before_spaces(), self._encode_lists) if file.splits_as_gpt2 else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids (int32) of each text. Raises an error other than UserError for text with a lone surrogate."""
        if self._segments is None:
            return [np.array(ids, np.int32) for ids in self._encode_lists(texts)]
        return self._segments.encode_batch([text.encode() for text in texts])

    def _encode_lists(self, texts: Sequence[str]) -> list[list[int]]:
        with _failures_told(self._name):
            found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def aligned(self, text: str) -> Iterator[tuple[str, bytes]]:
        """Yield (part of the text, what its tokens stand for), in order; tokens that share a character are one part."""
        with _failures_told(self._name):
            found = self._fast.encode(text, add_special_tokens=False)
        covered, end, kept = 0, 0, b""  # where the part begins and ends, and what its tokens stand for
        for number, (token, (begin, after)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            if begin >= end and end > covered:
                yield text[covered:end], kept
                covered, kept = end, b""
            kept += self._without_dummy_prefix(self.text_of(token)) if number == 0 else self.text_of(token)
            end = max(end, after)
        yield text[covered:], kept

    def _without_dummy_prefix(self, text: bytes) -> bytes:
        return text.removeprefix(b" ") if self._file.has_dummy_prefix else text

    def pieces(self) -> dict[str, tuple[int, float]]:
        """Return piece -> (id, 0) of all pieces of text, without those of single bytes or parts of characters."""
        left_out = {*self.control_ids(), *self._file.fallback_ids}
        return {name: (i, 0.0) for i, name in enumerate(self.names()) if i not in left_out}

    def names(self) -> list[str]:
        """Return the name of each id; "" for an id without a token."""
        return self._file.names

    def control_ids(self) -> list[int]:
        """Return the ids that stand for no text."""
        return self._file.control_ids

    def decode(self, ids: list[int]) -> str:
        """Return the text; control ids decode to nothing."""
        return self._without_dummy_prefix(b"".join(map(self.text_of, ids))).decode(errors="replace")

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a token, or None if there is no such token."""
        return self.names().index(piece) if piece and piece in self.names() else None

    def text_of(self, token: int) -> bytes:
        """Return the UTF-8 text that a token stands for."""
        return self._file.texts[token]

    shown = text_of  # in `decode`, too


# Reading takes a second for a vocabulary of 128,000 tokens, and nothing of it changes.
@lru_cache(maxsize=8)
def _read(model_bytes: bytes, name: str) -> tuple[TokenizerJson, Any]:
    file = TokenizerJson(model_bytes, name)
    if find_spec("tokenizers") is None:
        raise UserError(f"{name} needs the package tokenizers; install with pip install 'tokenizers>=0.20'")
    os.environ.setdefault(SETTING, "false")
    try:
        usable = file.usable()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} is damaged: its vocabulary or merges are no pieces ({error}); fetch it again"
        ) from error
    with _failures_told(name):
        fast = import_module("tokenizers").Tokenizer.from_str(usable)
    fast.encode_special_tokens = True  # a control token's name in a text is text
    moved = [content for content, i in file.matched.items() if fast.token_to_id(content) != i]
    if moved:
        raise UserError(f"{name} is damaged: the added token {moved[0]!r} does not have the id it says; fetch it again")
    return file, fast


@contextmanager
def _failures_told(name: str) -> Iterator[None]:
    """Turn an error of the package, which is a bare Exception or a panic in Rust, into a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the package tokenizers fails with {name}: {error}; fetch it again, or give another"
        ) from error
