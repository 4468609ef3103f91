"""Our model as lm-evaluation-harness knows a model (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

It scores as the package's own `hf` model does on an export: a context loses its beginning where it is too long, and an
empty one is the end-of-document token, which in training precedes every document.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import chain, groupby
from math import ceil
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import ValidationError

from megagpt.config.generation import GenerationConfig
from megagpt.config.mistakes import explain
from megagpt.distributed.collectives import on_every_rank
from megagpt.distributed.process_group import progress_bar, world_size
from megagpt.errors import UserError
from megagpt.evaluation.scoring import Continuation, over_ranks, score_continuations
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer

SHOWN = 60  # characters of a text, in a message
DRAWING = {"temperature", "top_k", "top_p"}  # what of generation_kwargs `generate` takes
WITHOUT_EFFECT = {"until", "max_gen_toks", "do_sample"}  # there


class HarnessModel(TemplateLM):
    """A model and its tokenizer. Every rank asks for everything; the ranks divide the work, and all get all results.

    The package's own division would draw other few-shot examples on another number of ranks.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, micro_batch: int) -> None:
        super().__init__()
        self._model, self._tokenizer, self._micro_batch = model, tokenizer, micro_batch
        self._terminal = sys.stderr  # while the package runs, it is not shown what it prints
        self.unspelt: set[str] = set()  # texts that the tokenizer cannot spell
        self.failure: Exception | None = None  # of the model or of another rank, which is no task's mistake

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self._tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._tokenizer.encode(string).tolist()
        if self._tokenizer.unknown_id in ids:
            self.unspelt.add(string)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation, and whether it is what greedy decoding gives."""
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation):
                raise UserError(f"the text {continuation!r:.{SHOWN}}, an answer without a question, has no tokens")
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not 0 < len(ids) <= self._model.cfg.seq_len:
                raise UserError(
                    f"the answer {continuation!r:.{SHOWN}} after {context[-SHOWN:]!r} is {len(ids):,} tokens, and the "
                    f"model scores 1 to {self._model.cfg.seq_len:,}, its positions; change the task"
                )
        return [(one.log_probability, one.is_greedy) for one in self._score(Continuation(*two) for _, *two in requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each whole text, in windows that do not overlap."""
        windows = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.cfg.seq_len,
                context_len=1,
            )
            windows.append([Continuation(*utils.make_disjoint_window(window)) for window in cut])
        scored = iter(self._score(chain.from_iterable(windows)))
        return [sum(next(scored).log_probability for _ in of_one) for of_one in windows]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Show the model's progress, and remember its failure."""
        try:
            with redirect_stderr(self._terminal):
                yield
        except Exception as error:
            self.failure = error
            raise

    def _score(self, wanted: Iterable[Continuation]) -> Any:
        with self._computing():
            return score_continuations(
                self._model, list(wanted), vocab_size=self._tokenizer.vocab_size, micro_batch=self._micro_batch
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop string or the number of tokens asked for."""
        asked = [self._asked(*request.args) for request in requests]
        longest_first = sorted(range(len(asked)), key=lambda i: (repr(asked[i][1]), -len(asked[i][0])))
        written: dict[int, str] = {}
        for _, group in groupby(longest_first, key=lambda i: repr(asked[i][1])):
            alike = list(group)
            texts = self._written([asked[i][0] for i in alike], asked[alike[0]][1])
            written |= dict(zip(alike, texts, strict=True))
        return [written[i] for i in range(len(requests))]

    def _asked(self, context: str, given: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Return a context's ids, as many as leave room for the text, and the settings of its generation."""
        settings = dict(normalize_gen_kwargs(given))
        seq_len, most = self._model.cfg.seq_len, settings["max_gen_toks"]
        if not 0 < most < seq_len:
            raise UserError(
                f"a task generates up to {most:,} tokens, and the model has {seq_len:,} positions, of which the "
                f"context needs some; set max_gen_toks in its generation_kwargs to less than {seq_len:,}"
            )
        if unknown := sorted(settings.keys() - DRAWING - WITHOUT_EFFECT):
            raise UserError(
                f"a task sets generation_kwargs.{unknown[0]}, and known are max_gen_toks, until, do_sample, "
                f"{', '.join(sorted(DRAWING))}; remove it"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(seq_len - most) :], settings

    def _written(self, contexts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue contexts with the same settings."""
        drawing = {"temperature": float(settings["do_sample"])} | {k: settings[k] for k in DRAWING & settings.keys()}
        until = settings.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        try:
            cfg = GenerationConfig.model_validate({"max_tokens": settings["max_gen_toks"], "stop": stop} | drawing)
        except ValidationError as error:
            raise UserError(f"a task's generation_kwargs: {explain(error, GenerationConfig, section='')}") from None
        firsts = range(0, len(contexts), self._micro_batch)
        rounds = ceil(len(firsts) / world_size())
        with self._computing(), progress_bar("generating", total=rounds, unit="batch") as bar:

            def continued(first: int) -> list[str]:
                bar.update()
                texts = complete(
                    self._model,
                    self._tokenizer,
                    contexts[first : first + self._micro_batch],
                    cfg,
                    seed=first,  # the seeds count up within a batch, so that its size changes no text
                    until_ended=world_size() == 1,  # ranks that share a model run equally many passes
                    agree=on_every_rank,
                )
                return [text.text for text in texts]

            return list(chain.from_iterable(over_ranks(firsts, continued)))
