"""Read a Hugging Face tokenizer.json: what each token stands for, and what must be switched off to encode text."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from megagpt.errors import UserError
from megagpt.tokenizer.sentencepiece_model import META_SPACE
from megagpt.tokenizer.tokenizer_file import (
    FORMAT,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    added_tokens,
    check_is_tokenizer,
    kind_of,
    parsed,
    vocabulary,
)

MOST_IDS = 2**24
OFF = ("truncation", "padding", "post_processor")  # sections that cut a text or add tokens
# Pre-tokenizers that drop nothing; UnicodeScripts drops spaces at the beginning.
KEEPS_TEXT = ("ByteLevel", "Split", "Digits", "Punctuation")


class TokenizerJson:
    """Reads a tokenizer.json from the bytes that with_end_of_document returns. Raises UserError."""

    def __init__(self, content: bytes, name: str) -> None:
        kept = parsed(content, name)
        text, end = kept.get("tokenizer_json"), kept.get("end_of_document")
        if kept.get("format") != FORMAT or not isinstance(text, str) or not isinstance(end, str):
            raise UserError(f"{name} is no tokenizer that megagpt has stored; give the original {TOKENIZER_JSON}")
        self.text, self._name, self._spec = text, name, parsed(text.encode(), name)
        check_is_tokenizer(self._spec, name)
        self._model: dict[str, Any] = self._spec["model"]
        self._vocab, self._added = vocabulary(self._model, name), added_tokens(self._spec, name)
        self.kind = f"Hugging Face {kind_of(self._model)}"
        self._normalizers = list(_steps(self._spec.get("normalizer")))
        self._pre_tokenizers = list(_steps(self._spec.get("pre_tokenizer")))
        self.names = self._names_by_id()
        if end not in self.names:
            raise UserError(
                f"{name} has no token {end!r}, which ends its documents; give the original {TOKENIZER_JSON}"
            )
        self.eod_id = self.names.index(end)
        self._check_unknown()

    @property
    def is_byte_level(self) -> bool:
        """Tell whether the letters of pieces stand for the bytes of UTF-8, as in GPT-2's vocabulary."""
        return any(step["type"] == "ByteLevel" for step in (*self._normalizers, *self._pre_tokenizers))

    @property
    def normalizer(self) -> str:
        """Return the kinds of its normalizers."""
        return "+".join(step["type"] for step in self._normalizers)

    @property
    def normalizes(self) -> bool:
        """Tell whether it changes characters before it encodes them, other than how it spells spaces."""
        return not all(map(_only_spells, self._normalizers))

    @property
    def has_dummy_prefix(self) -> bool:
        """Tell whether it adds a space at the beginning of a text."""
        steps = (*self._normalizers, *self._pre_tokenizers)
        return any(
            step["type"] == "Prepend"
            or (step["type"] == "ByteLevel" and step.get("add_prefix_space", False))
            or (step["type"] == "Metaspace" and _prepends(step))
            for step in steps
        )

    @cached_property
    def matched(self) -> dict[str, int]:
        """Return the added tokens that stand for text, which is searched for them first, and their ids."""
        ids = {content: token["id"] for content, token in self._added.items() if not token.get("special")}
        return {content: i for content, i in ids.items() if i != self.eod_id}

    @cached_property
    def control_ids(self) -> list[int]:
        """Return the ids that stand for no text: special tokens, the unknown token, and ids without a token."""
        unused = {i for i, piece in enumerate(self.names) if not piece}
        return sorted(self._special_ids | unused | (set() if self.unknown_id is None else {self.unknown_id}))

    @cached_property
    def texts(self) -> list[bytes]:
        """Return what each id stands for: bytes of UTF-8."""
        texts = [self._text_of(piece) for piece in self.names]
        if self.is_byte_level:  # added tokens are spelled as the text is
            for content, i in self.matched.items():
                texts[i] = content.encode()
        for i in self.control_ids:
            texts[i] = b""
        return texts

    @cached_property
    def fallback_ids(self) -> set[int]:
        """Return the ids of single bytes, for characters without a piece, and of parts of characters."""
        named = {i for piece, i in self._vocab.items() if self._is_byte(piece)}
        return named | {i for i, text in enumerate(self.texts) if not _is_utf8(text)}

    @cached_property
    def spells_all(self) -> bool:
        """Tell whether there is a token for each byte, so that nothing is unknown."""
        texts = [piece for piece, i in self._vocab.items() if i not in self._special_ids]
        alone = [piece for piece in texts if self._is_byte(piece) or (self.is_byte_level and len(piece) == 1)]
        return len({self._text_of(piece) for piece in alone}) == 256

    @cached_property
    def unknown_id(self) -> int | None:
        """Return the id of the token for text that cannot be spelled; None if there is none, or all can be."""
        if self.spells_all:
            return None
        unknown = self._model.get("unk_id") if self._is_unigram else self._vocab.get(str(self._model.get("unk_token")))
        return unknown if isinstance(unknown, int) else None

    @property
    def is_lossless(self) -> bool:
        """Tell whether any text comes back whole, which holds for byte-level models alone.

        Others spell spaces as U+2581, so that both come back as a space.
        """
        return (
            self.spells_all
            and not self.has_dummy_prefix
            and [step["type"] for step in (*self._normalizers, *self._pre_tokenizers)].count("ByteLevel") == 1
            and all(step["type"] == "ByteLevel" for step in self._normalizers)
            and all(step["type"] in KEEPS_TEXT and step.get("behavior") != "Removed" for step in self._pre_tokenizers)
            and all(map(self._keeps_text, self.matched))
        )

    @property
    def splits_as_gpt2(self) -> bool:
        """Tell whether GPT-2's pattern alone decides into which words a text is split."""
        steps = [*self._normalizers, *self._pre_tokenizers]
        alone = [step["type"] for step in steps] == ["ByteLevel"] and steps == self._pre_tokenizers
        return alone and not self.has_dummy_prefix and bool(steps[0].get("use_regex", True)) and not self.matched

    def usable(self) -> str:
        """Return the JSON for the `tokenizers` package: no text gives a control token, and all ids are always alike.

        A control token that the model itself has is given a name that occurs in no text. Padding, truncation, tokens at
        the beginning or end and BPE-dropout are off.
        """
        controls = set(self.control_ids)
        renamed = {p: f"\ufdd0megagpt: id {i}\ufdd1" for p, i in self._vocab.items() if i in controls}
        model = _switched_off(self._spec)["model"]
        if self._is_unigram:
            model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {renamed.get(piece, piece): i for piece, i in self._vocab.items()}
            model["merges"] = [pair for pair in model["merges"] if renamed.keys().isdisjoint(_made_of(pair))]
            unknown = model.get("unk_token")
            model["unk_token"] = renamed.get(unknown, unknown if unknown in self._vocab else None)
        added = [
            token | {"special": token["id"] in controls}
            for content, token in self._added.items()
            if content not in renamed
        ]
        return json.dumps(_switched_off(self._spec) | {"model": model, "added_tokens": added}, ensure_ascii=False)

    @property
    def _is_unigram(self) -> bool:
        return kind_of(self._model) == "Unigram"

    @cached_property
    def _special_ids(self) -> set[int]:
        return {token["id"] for token in self._added.values()} - set(self.matched.values()) | {self.eod_id}

    @cached_property
    def _spells_spaces(self) -> bool:
        around = [self._spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
        return META_SPACE in json.dumps(around, ensure_ascii=False)

    def _is_byte(self, piece: str) -> bool:
        return bool(self._model.get("byte_fallback")) and BYTE.fullmatch(piece) is not None

    def _text_of(self, piece: str) -> bytes:
        if self.is_byte_level:
            return b"".join(LETTERS.get(letter, letter.encode()) for letter in piece)
        if self._is_byte(piece):
            return bytes([int(piece[1:-1], 16)])
        return (piece.replace(META_SPACE, " ") if self._spells_spaces else piece).encode()

    def _keeps_text(self, content: str) -> bool:
        """Tell whether an added token stands for what it is matched with, wherever its id comes from."""
        token = self._added[content]
        takes_spaces = token.get("lstrip") or token.get("rstrip")
        return not takes_spaces and (content not in self._vocab or self._text_of(content) == content.encode())

    def _names_by_id(self) -> list[str]:
        ids = self._vocab | {content: token["id"] for content, token in self._added.items()}
        if not ids or min(ids.values()) < 0 or max(ids.values()) >= MOST_IDS:
            raise UserError(f"{self._name} is damaged: its ids are not within 0 and {MOST_IDS:,}; fetch it again")
        names = [""] * (max(ids.values()) + 1)
        for piece, i in ids.items():
            if names[i] and not self._added.get(piece, {}).get("special"):
                raise UserError(f"{self._name} is damaged: {names[i]!r} and {piece!r} both have id {i}; fetch it again")
            names[i] = piece
        return names

    def _check_unknown(self) -> None:
        if self.unknown_id == self.eod_id:
            raise UserError(
                f"{self._name} has {self.names[self.eod_id]!r} both for unknown text and for the end of a document: "
                "documents would end within a text; name another token as eos_token in "
                f"{TOKENIZER_CONFIG}, or train the tokenizer again with an unk_token of its own"
            )
        if self._is_unigram and self._model.get("unk_id") is None and not (self.is_byte_level and self.spells_all):
            raise UserError(
                f"{self._name} is a Unigram tokenizer without an unknown token, and fails at the first character that "
                "it has no piece for; train it again with unk_token, or give another one"
            )


def _steps(section: Any) -> Iterator[dict[str, Any]]:
    """Yield the normalizers or pre-tokenizers of a section, those of a sequence one after the other."""
    if not isinstance(section, dict):
        return
    inner = section.get("normalizers") or section.get("pretokenizers")
    if section.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from _steps(step)
    else:
        yield section | {"type": str(section.get("type"))}


def _only_spells(normalizer: dict[str, Any]) -> bool:
    """Tell whether a normalizer spells spaces or bytes in another way, and changes nothing else."""
    replaces_spaces = (normalizer.get("pattern"), normalizer.get("content")) == ({"String": " "}, META_SPACE)
    return normalizer["type"] in ("ByteLevel", "Prepend") or (normalizer["type"] == "Replace" and replaces_spaces)


def _prepends(metaspace: dict[str, Any]) -> bool:
    if "prepend_scheme" in metaspace:
        return bool(metaspace["prepend_scheme"] != "never")
    return bool(metaspace.get("add_prefix_space", True))


def _switched_off(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without what would change, add or drop tokens of a text."""
    return (
        spec | dict.fromkeys(OFF) | {"model": spec["model"] | ({"dropout": None} if "dropout" in spec["model"] else {})}
    )


def without_additions(text: str) -> str:
    """Return a tokenizer.json that adds no tokens and cuts no text: as it is, if it does neither."""
    spec = json.loads(text)
    if (spec.get("post_processor") or {}).get("type") == "ByteLevel":  # which changes no ids
        spec["post_processor"] = None
    off = _switched_off(spec)
    is_off = all(spec.get(key) is None for key in OFF) and spec["model"] == off["model"]
    return text if is_off else json.dumps(off, indent=2, ensure_ascii=False)


def _made_of(merge: str | list[str]) -> set[str]:
    """Return the two halves of a merge and what they give."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _letters_of_bytes() -> dict[str, bytes]:
    """Return GPT-2's letter of each byte: the printable ones of Latin-1 are their own, the rest follow from U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    letters = [*map(chr, own), *(chr(0x100 + i) for i in range(len(others)))]
    return {letter: bytes([byte]) for letter, byte in zip(letters, [*own, *others], strict=True)}


LETTERS = _letters_of_bytes()
BYTE = re.compile("<0x[0-9A-F]{2}>")
