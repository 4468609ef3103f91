"""A SentencePiece model: what it encodes and decodes, and what its protobuf tells of it."""

import codecs
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from megagpt.errors import UserError
from megagpt.terminal import builder_command
from megagpt.tokenizer.segment_cache import SegmentEncoder, cuts_between_pieces

KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType
LOG_ERRORS_ONLY = 2
META_SPACE = "\u2581"  # how SentencePiece spells a space inside its pieces
# How `decode` shows bytes that are no character; Python's own "replace" shows several as one U+FFFD.
EACH_BYTE = "megagpt: each byte"


class ModelSpec(NamedTuple):
    """Fields of a model's protobuf that SentencePiece has no call for."""

    kind: str
    normalizer: str
    has_dummy_prefix: bool
    normalizes: bool  # it changes characters or removes spaces
    keeps_text: bool  # its normalizer changes nothing, except that it spells spaces META_SPACE


class SentencePieceModel:
    """A model that encodes and decodes. Raises UserError for bytes that are no such model."""

    byte_errors = EACH_BYTE

    def __init__(self, model_bytes: bytes, name: str):
        self._processor, spec = read_model(model_bytes, name)
        self.kind, self.normalizer, self.normalizes = spec.kind, spec.normalizer, spec.normalizes
        self._keeps_text, self._has_dummy_prefix = spec.keeps_text, spec.has_dummy_prefix
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id: int = self._processor.eos_id()
        self.unknown_id: int = self._processor.unk_id()
        if self.eod_id < 0:
            raise UserError(
                f"{name} has no end-of-sentence piece </s>, which datasets store at the end of each document; "
                "train it again without eos_id=-1"
            )
        self._meta_space_ids = None if spec.has_dummy_prefix else self._byte_ids(META_SPACE)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids (int32) of each text. Raises an error of the bindings for text with a lone surrogate."""
        if self._segments is None:
            return [np.array(ids, np.int32) for ids in self._encode_lists(texts)]
        return self._segments.encode_batch([text.encode() for text in texts])

    @cached_property
    def _segments(self) -> SegmentEncoder | None:
        """The cache of encoded segments; None if a segment's ids may depend on the text around it."""
        if not (self._keeps_text and self.is_exact_in_parts and self.kind in ("unigram", "bpe", "char")):
            return None
        pieces = (piece.replace(META_SPACE, " ").encode() for piece in self.pieces())
        return SegmentEncoder(cuts_between_pieces(pieces), self._encode_lists)

    @property
    def is_exact_in_parts(self) -> bool:
        """Tell whether a text may be cut anywhere: the joined ids of its sections decode to the text."""
        return self._meta_space_ids is not None

    @cached_property
    def is_lossless(self) -> bool:
        """Tell whether any text comes back whole."""
        # Without a piece of its own, the space is encoded as the bytes of U+2581, and decoded to that character.
        return self._keeps_text and self.is_exact_in_parts and self.decode(self.encode_batch([" "])[0].tolist()) == " "

    def aligned(self, text: str) -> Iterator[tuple[str, bytes]]:
        """Yield (part of the text, what its tokens stand for), in order."""
        if self.is_exact_in_parts:
            text = text.replace(META_SPACE, "")  # which is encoded as bytes
        found = self._processor.encode(text, return_type="offset_mapping", num_threads=1)
        dummy_prefix = META_SPACE if self._has_dummy_prefix else ""  # of the first piece
        kept, covered = b"", 0  # what the tokens read stand for, and where the text of those before ends
        for token, piece, (begin, end) in zip(found["ids"], found["pieces"], found["offsets"], strict=True):
            kept += self._text_of(token, piece.removeprefix(dummy_prefix))
            dummy_prefix = ""
            if begin < end:  # where several tokens stand for one character, only one of them has its offsets
                yield text[covered:end], kept
                kept, covered = b"", end
        yield text[covered:], b""

    def best(self, text: str, n: int) -> list[tuple[float, list[int]]]:
        """Return (log probability, ids) of the n likeliest tokenizations of a short text; unigram models only."""
        if META_SPACE in text:
            return [(0.0, self.encode_batch([text])[0].tolist())]
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
        """Return the name of each id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def control_ids(self) -> list[int]:
        """Return the ids that stand for no text."""
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

    def decode(self, ids: list[int]) -> str:
        """Return the text; control ids decode to nothing."""
        return self._processor.decode(ids)

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None if there is no such piece."""
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def text_of(self, token: int) -> bytes:
        """Return the UTF-8 text that a token stands for, which is none for control tokens and the unknown token."""
        return self._text_of(token, self._processor.id_to_piece(token))

    def shown(self, token: int) -> bytes:
        """Return the UTF-8 text that `decode` makes of a token within a text; the unknown token has some, too."""
        return self.text_of(token) or self.decode([token]).encode()

    def _text_of(self, token: int, piece: str) -> bytes:
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
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def _encode_around_meta_space(self, text: str, meta_space_ids: list[int]) -> list[int]:
        first, *rest = self._encode_plain(text.split(META_SPACE))
        return [*first, *(i for part in rest for i in (*meta_space_ids, *part))]

    def _byte_ids(self, text: str) -> list[int] | None:
        """Return the byte-fallback ids that spell `text`, or None if the model has no byte fallback."""
        ids: list[int] = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return ids if all(map(self._processor.is_byte, ids)) else None


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replaced)


def read_model(model_bytes: bytes, name: str) -> tuple[sentencepiece.SentencePieceProcessor, ModelSpec]:
    """Parse a model. Raises UserError, whichever way the bytes are wrong."""
    try:
        return _parse(model_bytes)
    except (RuntimeError, LookupError, UnicodeDecodeError, TypeError) as error:
        raise UserError(
            f"{name} is not a SentencePiece model; give the .model file that `{builder_command()} train-tokenizer` "
            "writes, or a Hugging Face tokenizer.json"
        ) from error


# A processor takes 50 ms to make and never changes, so all tokenizers of a model share it.
@lru_cache(maxsize=8)
def _parse(model_bytes: bytes) -> tuple[sentencepiece.SentencePieceProcessor, ModelSpec]:
    sentencepiece.set_min_log_level(LOG_ERRORS_ONLY)
    processor = sentencepiece.SentencePieceProcessor()
    if not (model_bytes and processor.load_from_serialized_proto(model_bytes) and processor.get_piece_size()):
        raise LookupError("no pieces")
    processor.id_to_piece(list(range(processor.get_piece_size())))  # a UnicodeDecodeError now rather than later
    return processor, _describe(model_bytes)


def _describe(model_bytes: bytes) -> ModelSpec:
    model = dict(_protobuf_fields(model_bytes))
    trainer_spec = dict(_protobuf_fields(model.get(2, b"")))
    normalizer_spec = dict(_protobuf_fields(model.get(3, b"")))
    rules, has_dummy_prefix = normalizer_spec.get(2, b""), bool(normalizer_spec.get(3, 1))
    trims_spaces, spells_spaces = normalizer_spec.get(4, 1), normalizer_spec.get(5, 1)
    return ModelSpec(
        kind=KINDS[trainer_spec.get(3, 1)],
        normalizer=normalizer_spec.get(1, b"").decode(),
        has_dummy_prefix=has_dummy_prefix,
        normalizes=bool(rules or trims_spaces),
        keeps_text=not (rules or has_dummy_prefix or trims_spaces) and bool(spells_spaces),
    )


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7  # 0 varint, 1 and 5 fixed size, 2 with its length in front
        if wire_type == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return (value, where it ends): seven bits a byte, the lowest first, up to a byte without the top bit."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
