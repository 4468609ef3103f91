"""Decode a text that grows by a token at a time."""

import codecs
from typing import Protocol


class Model(Protocol):
    """Describes what decoding needs of a tokenizer's model."""

    byte_errors: str  # the name of the error handler by which `decode` shows bytes that are no character

    def decode(self, ids: list[int], /) -> str: ...
    def shown(self, token: int, /) -> bytes: ...


class TextDecoder:
    """Returns the text of each token as it comes, never half a character.

    Bytes of a character are held back until it is whole, or known to be none. Joined, `beginning` and all that is
    returned are the text that the model decodes all tokens to.
    """

    def __init__(self, model: Model, ids: list[int]) -> None:
        self._model, self._utf8 = model, codecs.getincrementaldecoder("utf-8")(model.byte_errors)
        self.beginning = model.decode(ids)
        self._first: list[int] | None = None if self.beginning else ids

    def add(self, token: int) -> str:
        """Return the characters that are whole with this token."""
        if self._first is not None:
            return self._add_first(token)
        text = self._model.shown(token)
        # A control token is within no character.
        return self._utf8.decode(text) if text else self.end()

    def _add_first(self, token: int) -> str:
        """Decode all tokens so far: a model may drop the spaces that a text begins with."""
        assert self._first is not None
        self._first.append(token)
        shown = self._model.shown(token)
        text = self._model.decode(self._first) if _is_utf8(shown) else self._utf8.decode(shown)
        if text or not _is_utf8(shown):
            self._first = None
        return text

    def end(self) -> str:
        """Return what has been held back: U+FFFD for the bytes of half a character."""
        return self._utf8.decode(b"", final=True)


def _is_utf8(text: bytes) -> bool:
    return "\ufffd" not in text.decode(errors="replace") or "\ufffd".encode() in text
