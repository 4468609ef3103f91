"""Parse a SentencePiece model: the processor that encodes and decodes, and what its protobuf tells of it."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import sentencepiece

from megagpt.errors import UserError
from megagpt.terminal import builder_command

KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType
LOG_ERRORS_ONLY = 2


class ModelSpec(NamedTuple):
    """Fields of a model's protobuf that SentencePiece has no call for."""

    kind: str
    normalizer: str
    has_dummy_prefix: bool
    normalizes: bool  # it changes characters or removes spaces
    keeps_text: bool  # its normalizer changes nothing, except that it spells spaces META_SPACE


def read_model(model_bytes: bytes, name: str) -> tuple[sentencepiece.SentencePieceProcessor, ModelSpec]:
    """Parse a model. Raises UserError, whichever way the bytes are wrong."""
    try:
        return _parse(model_bytes)
    except (RuntimeError, LookupError, UnicodeDecodeError, TypeError) as error:
        raise UserError(
            f"{name} is not a SentencePiece model; "
            f"give the .model file that `{builder_command()} train-tokenizer` writes"
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
