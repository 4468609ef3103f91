"""Recognize a Hugging Face tokenizer.json, find the token that ends documents, and store both in one file.

The file has the tokenizer whole, but for the end of a document: that is eos_token in tokenizer_config.json beside it.
Datasets and checkpoints keep both in one file, so that their hash is that of all that decides what tokens mean:

    {"format": "megagpt-tokenizer", "end_of_document": "<|endoftext|>", "tokenizer_json": "...the file's text..."}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.terminal import typed

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FORMAT = "megagpt-tokenizer"
BOM = b"\xef\xbb\xbf"
USUAL_ENDS = (  # of a document, in the vocabularies of known models
    *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<|endofdocument|>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
OTHER_ROLES = ("unk", "pad", "bos", "mask", "<s>", "cls")  # in the names of special tokens
SHOWN = 8  # names in a message
MADE_FOR_READING = "made for models that read text and not for those that write it; give a BPE or Unigram tokenizer"


def is_json(content: bytes) -> bool:
    """Tell whether a tokenizer is JSON, and not a SentencePiece model, whose protobuf begins with a line feed."""
    return content.removeprefix(BOM).lstrip(b" \t\r")[:1] == b"{"


def with_end_of_document(content: bytes, path: Path) -> bytes:
    """Return the bytes that datasets keep of a tokenizer.json; those that are kept already are returned as they are.

    Raises UserError if it is none, or if its end-of-document token is not plain.
    """
    spec = parsed(content, str(path))
    if spec.get("format") == FORMAT:
        return content
    check_is_tokenizer(spec, str(path))
    end = _end_of_document(spec, path)
    kept = {"format": FORMAT, "end_of_document": end, "tokenizer_json": content.removeprefix(BOM).decode()}
    return json.dumps(kept, ensure_ascii=False).encode()


def parsed(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged: it is not whole JSON ({error}); restore it or fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} is damaged: its JSON is no object; restore it or fetch it again")
    return found


def check_is_tokenizer(spec: dict[str, Any], name: str) -> None:
    """Raise UserError for another file of a model's folder, and for a kind of model that cannot write text."""
    model = spec.get("model")
    if not isinstance(model, dict):
        is_vocabulary = len(spec) > 1 and all(isinstance(value, int) for value in spec.values())
        what = "a vocabulary alone" if is_vocabulary else 'no tokenizer.json: it has no section "model"'
        raise UserError(
            f"{name} is {what}; give the tokenizer.json that transformers writes by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    kind = kind_of(model)
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{name} is a {kind} tokenizer, {MADE_FOR_READING}")
    if kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise UserError(f"{name} marks the pieces of a word and loses the spaces between words: {MADE_FOR_READING}")


def kind_of(model: dict[str, Any]) -> str:
    if "merges" in model:
        return "BPE"  # old files have no type
    return str(model.get("type", "Unigram" if isinstance(model.get("vocab"), list) else "unknown"))


def _end_of_document(spec: dict[str, Any], path: Path) -> str:
    added, vocab = added_tokens(spec, str(path)), vocabulary(spec["model"], str(path))
    config = path.parent / TOKENIZER_CONFIG
    special = [name for name, token in added.items() if token.get("special")]
    way_out = _way_out(special or [name for name in USUAL_ENDS if name in vocab], config)
    if config.is_file():
        named = parsed(config.read_bytes(), str(config)).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        if named:
            if named not in added and named not in vocab:
                raise UserError(f"{config}: eos_token={named!r} is no token of {path}; {way_out}")
            return str(named)
    usual = [name for name in USUAL_ENDS if name in added]
    if len(usual) == 1:
        return usual[0]
    why = f"has {' and '.join(usual)}" if usual else "has no token of a usual name for that"
    raise UserError(f"which token of {path} ends a document is not plain: it {why}; {way_out}")


def _way_out(special: Sequence[str], config: Path) -> str:
    """Return how to name the end of a document: usual names come first, and those of other roles last."""
    special = sorted(
        special, key=lambda name: (name not in USUAL_ENDS, any(role in name.lower() for role in OTHER_ROLES))
    )
    if not special:
        return f"it has no special tokens at all; add one such as <|endoftext|>, and name it as eos_token in {config}"
    more = f" and {len(special) - SHOWN} more" if len(special) > SHOWN else ""
    those = f"one of {', '.join(special[:SHOWN])}{more}"
    if config.is_file():
        return f"set eos_token there to {those}"
    line = json.dumps({"eos_token": special[0]}, ensure_ascii=False)
    return f"name {those}, for example by: echo {typed(line)} > {typed(config)}"


def added_tokens(spec: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return content -> added token. Raises UserError for a damaged section."""
    found = spec.get("added_tokens") or []
    if not isinstance(found, list) or not all(map(_is_added_token, found)):
        raise UserError(f"{name} is damaged: an added token has no content or no id; fetch it again")
    return {token["content"]: token for token in found}


def _is_added_token(token: Any) -> bool:
    if not isinstance(token, dict):
        return False
    content, number = token.get("content"), token.get("id")
    return isinstance(content, str) and content != "" and isinstance(number, int) and number >= 0


def vocabulary(model: dict[str, Any], name: str) -> dict[str, int]:
    """Return piece -> id of the model, without added tokens."""
    vocab = model.get("vocab")
    try:
        if kind_of(model) == "Unigram":
            return {str(piece): i for i, (piece, _) in enumerate(vocab or ())}
        found = {str(piece): int(i) for piece, i in (vocab or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name} is damaged: its vocabulary is no list of pieces ({error}); fetch it again") from error
    return found
