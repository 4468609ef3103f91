"""The tokenizer, a SentencePiece model: text to token ids and back, without losing a byte.

The promise decode(encode(text)) == text holds for the models that data_tools trains (`is_lossless`): identity
normalization, no dummy prefix, spaces kept, newline and tab as pieces of their own, byte fallback.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megagpt.data.segment_cache import SegmentEncoder
from megagpt.data.sentencepiece_model import read_model
from megagpt.errors import UserError
from megagpt.git_pointers import pointer_instead_of
from megagpt.terminal import builder_command

META_SPACE = "\u2581"  # how SentencePiece spells a space inside its pieces


class Tokenizer:
    """A SentencePiece model and the exact bytes it was read from. Raises UserError for bytes that are no such model."""

    def __init__(self, model_bytes: bytes, *, name: str = "tokenizer model"):
        self._processor, spec = read_model(model_bytes, name)
        self.kind, self.normalizer, self.normalizes = spec.kind, spec.normalizer, spec.normalizes
        self._keeps_text, self._has_dummy_prefix = spec.keeps_text, spec.has_dummy_prefix
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id: int = self._processor.eos_id()
        self.unknown_id: int = self._processor.unk_id()
        if self.eod_id < 0:
            raise UserError(
                f"{name} has no end-of-sentence piece </s>, which datasets store at the end of each document; "
                "train it again without eos_id=-1"
            )
        self._meta_space_ids = None if spec.has_dummy_prefix else self._byte_ids(META_SPACE)

    @classmethod
    def load(cls, path: Path | str, *, sha256: str | None = None) -> "Tokenizer":
        """Read a model file; with `sha256`, refuse other bytes before SentencePiece parses them. Raises UserError."""
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer {path}: {error.strerror}; `{builder_command()} train-tokenizer` makes one"
            ) from error
        if message := pointer_instead_of(str(path), model_bytes):
            raise UserError(message)
        found = hashlib.sha256(model_bytes).hexdigest()
        if sha256 is not None and found != sha256:
            raise UserError(
                f"{path} is not the tokenizer this dataset was made with: sha256 {found[:16]}..., "
                f"expected {sha256[:16]}...; restore the original file"
            )
        return cls(model_bytes, name=str(path))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        """Pickle as the model's bytes: other processes begin without the cache of segments."""
        return Tokenizer, (self.model_bytes,)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids as int32, without an end-of-document id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts at once, which is faster. Raises UserError for text with a lone surrogate."""
        if self._segments is None:
            return [np.array(ids, np.int32) for ids in self._encode_lists(texts)]
        try:
            return self._segments.encode_batch([text.encode() for text in texts])
        except UnicodeEncodeError as error:
            raise _no_unicode(error) from error

    @cached_property
    def _segments(self) -> SegmentEncoder | None:
        """The cache of encoded segments; None if a segment's ids may depend on the text around it."""
        if not (self._keeps_text and self.is_exact_in_parts and self.kind in ("unigram", "bpe", "char")):
            return None
        return SegmentEncoder((piece.replace(META_SPACE, " ").encode() for piece in self.pieces()), self._encode_lists)

    @property
    def is_exact_in_parts(self) -> bool:
        """Tell whether a text may be cut anywhere: the joined ids of its sections decode to the text."""
        return self._meta_space_ids is not None

    @cached_property
    def is_lossless(self) -> bool:
        """Tell whether decode(encode(text)) == text for any text: its tokens then have the bytes of the text."""
        # Without a piece of its own, the space is encoded as the bytes of U+2581, and decoded to that character.
        return self._keeps_text and self.is_exact_in_parts and self.round_trips(" ")

    def lost(self, text: str) -> Counter[str]:
        """Return the parts of the text that its tokens do not decode to, each with the number of UTF-8 bytes lost."""
        if self.is_exact_in_parts:
            text = text.replace(META_SPACE, "")  # which is encoded as bytes
        found = self._processor.encode(text, return_type="offset_mapping", num_threads=1)
        lost: Counter[str] = Counter()
        dummy_prefix = META_SPACE if self._has_dummy_prefix else ""  # of the first piece
        kept, covered = b"", 0  # what the tokens read stand for, and where the text of those before ends
        for token, piece, (begin, end) in zip(found["ids"], found["pieces"], found["offsets"], strict=True):
            kept += self._text_of(token, piece.removeprefix(dummy_prefix))
            dummy_prefix = ""
            if begin < end:  # where several tokens stand for one character, only one of them has its offsets
                part = _missing(text[covered:end], kept.decode(errors="replace"))
                lost[part] += len(part.encode())
                kept, covered = b"", end
        lost[text[covered:]] += len(text[covered:].encode())
        return +lost  # without what nothing is lost of

    def round_trips(self, text: str) -> bool:
        """Tell whether decode(encode(text)) == text."""
        return self.decode(self.encode(text)) == text

    def best(self, text: str, n: int) -> list[tuple[float, list[int]]]:
        """Return (log probability, ids) of the n likeliest tokenizations of a short text; unigram models only."""
        if META_SPACE in text:
            return [(0.0, self.encode(text).tolist())]
        score = self._scores.__getitem__
        return [(sum(map(score, ids)), ids) for ids in self._processor.nbest_encode_as_ids(text, n)]

    @cached_property
    def _scores(self) -> list[float]:
        return [self._processor.get_score(i) for i in range(self.vocab_size)]

    def pieces(self) -> dict[str, tuple[int, float]]:
        """Return piece -> (id, score) of all pieces of text, without those of single bytes; META_SPACE is the space."""
        sp = self._processor
        usual = (i for i in range(self.vocab_size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)))
        return {sp.id_to_piece(i): (i, self._scores[i]) for i in usual}

    def names(self) -> list[str]:
        """Return the name of each id, as the model spells it: pieces, <0x41> for a byte, and control tokens."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def control_ids(self) -> list[int]:
        """Return the ids that stand for no text: control tokens and the unknown token."""
        sp = self._processor
        return [i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i)]

    def score(self, token: int) -> float:
        """Return the log probability of a unigram model's piece; of a BPE model's, minus its rank."""
        return self._scores[token]

    def encode_bytes(self, text: str) -> list[int]:
        """Encode a text by byte fallback alone, one token for each UTF-8 byte."""
        ids = self._byte_ids(text)
        assert ids is not None, "the model has no byte fallback"
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; control ids (end of document, beginning of sentence, padding) decode to nothing."""
        return self._processor.decode(np.asarray(ids, dtype=np.int64).tolist())

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, spelled as in the model, or None if it has no such piece."""
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def token_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes of text each id stands for: int32, (vocab_size,); control ids stand for 0."""
        return np.array([self._bytes_of(i) for i in range(self.vocab_size)], dtype=np.int32)

    def _bytes_of(self, token: int) -> int:
        return len(self._text_of(token, self._processor.id_to_piece(token)))

    def _text_of(self, token: int, piece: str) -> bytes:
        """Return the UTF-8 text that a token stands for, which is none for control tokens and the unknown token."""
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # <0x41>
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(META_SPACE, " ").encode()

    def _encode_lists(self, texts: Sequence[str]) -> list[list[int]]:
        # A literal U+2581 would decode as a space, so it goes in as the three bytes of its UTF-8 form.
        if self._meta_space_ids is None:
            return self._encode_plain(texts)
        encoded = self._encode_plain(["" if META_SPACE in text else text for text in texts])
        for i, text in enumerate(texts):
            if META_SPACE in text:
                encoded[i] = self._encode_around_meta_space(text, self._meta_space_ids)
        return encoded

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._processor.encode(list(texts), out_type=int, num_threads=1)
        except (RuntimeError, TypeError):  # which of them the bindings raise depends on the length of the list
            for text in texts:
                _check_is_unicode(text)
            raise

    def _encode_around_meta_space(self, text: str, meta_space_ids: list[int]) -> list[int]:
        first, *rest = self._encode_plain(text.split(META_SPACE))
        return [*first, *(i for part in rest for i in (*meta_space_ids, *part))]

    def _byte_ids(self, text: str) -> list[int] | None:
        """Return the byte-fallback ids that spell `text`, or None if the model has no byte fallback."""
        ids: list[int] = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return ids if all(map(self._processor.is_byte, ids)) else None


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
        raise _no_unicode(error) from error


def _no_unicode(error: UnicodeEncodeError) -> UserError:
    return UserError(f"the text holds a lone surrogate at character {error.start}, which is no Unicode text; remove it")
