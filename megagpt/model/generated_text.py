"""One text that is being generated: its tokens, what of it may be shown, and why it ended."""

from collections.abc import Sequence

from megagpt.config.generation import GenerationConfig
from megagpt.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
STOP, LENGTH, END_OF_DOCUMENT = "stop", "length", "end of document"  # why a text ended


class GeneratedText:
    """A prompt and what the model adds to it, a token at a time.

    A prompt that is text starts a document: an end-of-document id precedes it, as in the training stream. Token ids are
    read as they are, and are no part of `whole`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, cfg: GenerationConfig, *, seed: int) -> None:
        self.prompt, self.seed = prompt, seed
        self._eod_id, self._max_tokens, self._stop = tokenizer.eod_id, cfg.max_tokens, cfg.stop
        ids: list[int] = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else []
        self.context = [tokenizer.eod_id, *ids] if isinstance(prompt, str) else list(prompt)  # what the model reads
        self._decoder = tokenizer.decoder(ids)
        self.prompt_as_read = self._decoder.beginning  # the tokenizer may change a prompt
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []  # of each token, by the model alone: without temperature and filters
        self.ended: str | None = None
        self._parts: list[str] = []  # that are text for good
        self._held = ""  # may be the beginning of a stop string
        self._taken = 0  # of the parts

    @property
    def text(self) -> str:
        """The text that the model has added, as far as it is certain."""
        return "".join(self._parts)

    @property
    def whole(self) -> str:
        """The prompt and what the model has added."""
        return self.prompt_as_read + self.text

    def new_text(self) -> str:
        """Return what was added to `text` since the last call."""
        new, self._taken = "".join(self._parts[self._taken :]), len(self._parts)
        return new

    def add(self, token: int, log_probability: float) -> None:
        """Append a token. Afterwards `ended` tells why the text is complete, if it is."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self._extend("" if token == self._eod_id else self._decoder.add(token))
        if self.ended is None and (token == self._eod_id or len(self.tokens) == self._max_tokens):
            self._extend(self._decoder.end())
            if self.ended is None:
                self._parts.append(self._held)
                self.ended = END_OF_DOCUMENT if token == self._eod_id else LENGTH

    def _extend(self, new: str) -> None:
        """Add text up to a stop string; hold back an end that a stop string may begin with."""
        text = self._held + new
        # The one that is complete first: which that is does not depend on where tokens end.
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.ended = STOP
            held = len(text) - min(found)[1]
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        self._parts.append(text[:certain])


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that the stop string begins with, and is not all of."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
