"""The tokenizer, a SentencePiece model or a Hugging Face tokenizer.json: text to token ids and back.

The promise decode(encode(text)) == text, to the last byte, holds where `is_lossless`: for the models that data_tools
trains (identity normalization, no dummy prefix, spaces kept, newline and tab as pieces of their own, byte fallback) and
for byte-level BPE such as GPT-2's.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.errors import UserError
from megagpt.git_pointers import pointer_instead_of
from megagpt.terminal import builder_command
from megagpt.tokenizer.huggingface_model import HuggingFaceModel
from megagpt.tokenizer.sentencepiece_model import SentencePieceModel
from megagpt.tokenizer.text_decoder import TextDecoder
from megagpt.tokenizer.tokenizer_file import TOKENIZER_JSON, is_json, with_end_of_document


class Tokenizer:
    """A model and the exact bytes it was read from. Raises UserError for bytes that are no model.

    A tokenizer.json comes as with_end_of_document stores it, as Tokenizer.load does.
    """

    def __init__(self, model_bytes: bytes, *, name: str = "tokenizer model"):
        kind = HuggingFaceModel if is_json(model_bytes) else SentencePieceModel
        self._model: HuggingFaceModel | SentencePieceModel = kind(model_bytes, name)
        self.kind, self.normalizer, self.normalizes = self._model.kind, self._model.normalizer, self._model.normalizes
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size: int = self._model.vocab_size
        self.eod_id: int = self._model.eod_id
        self.unknown_id: int | None = self._model.unknown_id

    @classmethod
    def load(cls, path: Path | str, *, sha256: str | None = None) -> "Tokenizer":
        """Read a model file, or the one in a folder; with `sha256`, refuse other bytes before they are parsed.

        Raises UserError.
        """
        path = _file_of(Path(path))
        try:
            model_bytes = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer {path}: {error.strerror}; give a SentencePiece .model file, a "
                f"{TOKENIZER_JSON} or a folder with one (names of a hub are not downloaded); "
                f"`{builder_command()} train-tokenizer` makes one"
            ) from error
        if message := pointer_instead_of(str(path), model_bytes):
            raise UserError(message)
        found = hashlib.sha256(model_bytes).hexdigest()
        if sha256 is not None and found != sha256:
            raise UserError(
                f"{path} is not the tokenizer this dataset was made with: sha256 {found[:16]}..., "
                f"expected {sha256[:16]}...; restore the original file"
            )
        return cls(with_end_of_document(model_bytes, path) if is_json(model_bytes) else model_bytes, name=str(path))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        """Pickle as the model's bytes: other processes begin without the cache of segments."""
        return Tokenizer, (self.model_bytes,)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids as int32, without an end-of-document id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts at once, which is faster. Raises UserError for text with a lone surrogate."""
        try:
            return self._model.encode_batch(texts)
        except (UnicodeEncodeError, RuntimeError, TypeError):  # the bindings raise one or another of them
            for text in texts:
                _check_is_unicode(text)
            raise

    @property
    def is_exact_in_parts(self) -> bool:
        """Tell whether a text may be cut anywhere: the joined ids of its sections decode to the text."""
        return self._model.is_exact_in_parts

    @property
    def is_lossless(self) -> bool:
        """Tell whether decode(encode(text)) == text for any text: its tokens then have the bytes of the text."""
        return self._model.is_lossless

    def lost(self, text: str) -> Counter[str]:
        """Return the parts of the text that its tokens do not decode to, each with the number of UTF-8 bytes lost."""
        lost: Counter[str] = Counter()
        for part, kept in self._model.aligned(text):
            missing = _missing(part, kept.decode(errors="replace"))
            lost[missing] += len(missing.encode())
        return +lost  # without what nothing is lost of

    def round_trips(self, text: str) -> bool:
        """Tell whether decode(encode(text)) == text."""
        return self.decode(self.encode(text)) == text

    @property
    def sentencepiece(self) -> SentencePieceModel:
        """The SentencePiece model, for what only such a model answers."""
        assert isinstance(self._model, SentencePieceModel), "a Hugging Face tokenizer.json"
        return self._model

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the Hugging Face tokenizer.json; None for a SentencePiece model."""
        return self._model.tokenizer_json if isinstance(self._model, HuggingFaceModel) else None

    def best(self, text: str, n: int) -> list[tuple[float, list[int]]]:
        """Return (log probability, ids) of the n likeliest tokenizations of a short text; unigram models only."""
        return self.sentencepiece.best(text, n)

    def pieces(self) -> dict[str, tuple[int, float]]:
        """Return piece -> (id, score) of all pieces of text, without those of single bytes of a character.

        They are spelled as in the model: META_SPACE is SentencePiece's space. Those of a tokenizer.json have score 0.
        """
        return self._model.pieces()

    def names(self) -> list[str]:
        """Return the name of each id, as the model spells it: pieces, <0x41> for a byte, and control tokens."""
        return self._model.names()

    def control_ids(self) -> list[int]:
        """Return the ids that stand for no text: control tokens and the unknown token."""
        return self._model.control_ids()

    def score(self, token: int) -> float:
        """Return the log probability of a unigram model's piece; of a BPE model's, minus its rank."""
        return self.sentencepiece.score(token)

    def encode_bytes(self, text: str) -> list[int]:
        """Encode a text by byte fallback alone, one token for each UTF-8 byte."""
        return self.sentencepiece.encode_bytes(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; control ids (end of document, beginning of sentence, padding) decode to nothing."""
        return self._model.decode(np.asarray(ids, dtype=np.int64).tolist())

    def decoder(self, ids: Sequence[int] = ()) -> "TextDecoder":
        """Return what decodes tokens one by one, after a text of `ids`."""
        return TextDecoder(self._model, list(ids))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, spelled as in the model, or None if it has no such piece."""
        return self._model.piece_id(piece)

    def token_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes of text each id stands for: int32, (vocab_size,); control ids stand for 0."""
        return np.array([len(self._model.text_of(i)) for i in range(self.vocab_size)], dtype=np.int32)


def _file_of(path: Path) -> Path:
    """Return the tokenizer's file in a folder, or the path itself if it is none."""
    if not path.is_dir():
        return path
    names = (TOKENIZER_JSON, "tokenizer.model")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"the folder {path} has no {' and no '.join(names)}; give the tokenizer's file")
    return found


def _missing(text: str, kept: str) -> str:
    """Return `text` without the beginning and the end that it has in common with `kept`."""
    begin = common_length(text, kept)
    rest, kept = text[begin:], kept[begin:]
    return rest[: len(rest) - common_length(rest[::-1], kept[::-1])]


def common_length(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next((i for i, (mine, its) in enumerate(zip(a, b, strict=False)) if mine != its), min(len(a), len(b)))


def padded_vocab_size(vocab_size: int) -> int:
    """Round up to a multiple of 128, a matrix size that GPUs multiply fast."""
    return -(-vocab_size // 128) * 128


def _check_is_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate at character {error.start}, which is no Unicode text; remove it"
        ) from error
