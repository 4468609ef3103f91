"""Measure how much of its training text a model recites (Carlini et al. 2022, "Quantifying memorization across neural
language models").

A passage is the beginning of a training sample, within one document. The model reads its first half and continues by
the likeliest tokens. The passage is memorized (extractable with that many tokens of context) if its second half comes,
token by token. Passages of the validation split, which the run has not read, show what is merely easy to guess.

Shapes: N passages of 2 L tokens, L of context and L to recite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megagpt.config.generation import GenerationConfig
from megagpt.data.dataset import TokenStream
from megagpt.data.packing import Packing
from megagpt.data.permutation import permute
from megagpt.data.times_read import Passages, times_read, trained_samples
from megagpt.data.training_set import TrainingSet
from megagpt.distributed.process_group import progress_bar
from megagpt.errors import UserError
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer

LONGEST = 50  # tokens to recite, as in the paper, and of context
TRIES = 50  # samples that are looked at for each passage: one that crosses the end of a document is none
KEY = 0  # of the choice of passages
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Recited:
    """Holds how much a model recites of passages that its run has read equally often."""

    passages: int
    exactly: float  # share of the passages of which every token comes
    tokens: float  # share of the tokens that come in their place


def half_length(seq_len: int) -> int:
    """Return L: so short, too, that an epoch that cuts the text at other places often holds a passage whole."""
    return max(1, min(LONGEST, seq_len // 4))


def training_passages(data: TrainingSet, packing: Packing, step: int, n: int, half: int) -> tuple[I64, I64]:
    """Return (N, 2 L) tokens of passages that the steps up to `step` read, at most n, and how often each was read.

    Every sample that was trained on is chosen with the same probability. Raises UserError if no document is as long.
    """
    trained = trained_samples(data.mixture, step)
    places, tokens = [], []
    for sample in islice(_shuffled(trained), n * TRIES):
        span = data.spans(sample)[0]
        passage = span.tokens[: 2 * half]
        if len(passage) == 2 * half and (passage[1:] != span.dataset.eod_id).all():
            places.append(data.place(sample))
            tokens.append(passage)
        if len(tokens) == n:
            break
    if not tokens:
        raise UserError(
            f"none of {n * TRIES:,} training samples begins with {2 * half} tokens of one document, so that there is "
            "nothing to recite; give a larger N, or evaluate a model whose documents are longer"
        )
    dataset, variant, begin = np.array(places, np.int64).T
    # In a stream of packed rows one input is a row, and its target would be in the next.
    length = 2 if packing.plan_rows else 2 * half
    passages = Passages(dataset, variant, begin, length)
    with progress_bar("counting", total=sum(map(len, trained)), unit="sample") as bar:
        return np.stack(tokens), times_read(data.mixture, step, passages, drew=bar.update)


def unread_passages(stream: TokenStream, n: int, half: int) -> I64:
    """Return (N, 2 L) tokens of passages of a split, at most n, each within a document."""
    tokens = []
    for begin in islice(_shuffled([range(max(0, stream.n_tokens - 2 * half))]), n * TRIES):
        passage = np.empty(2 * half, np.int64)
        stream.copy(begin, passage)
        if (passage[1:] != stream.dataset.eod_id).all():
            tokens.append(passage)
        if len(tokens) == n:
            break
    return np.stack(tokens) if tokens else np.empty((0, 2 * half), np.int64)


def _shuffled(ranges: Sequence[range]) -> Iterator[int]:
    """Yield all numbers of several ranges, in an order that depends on their lengths alone."""
    ends = np.cumsum([len(numbers) for numbers in ranges])
    for i in range(int(ends[-1])):
        [at] = permute(np.array([i]), int(ends[-1]), KEY)
        which = int(np.searchsorted(ends, at, side="right"))
        yield ranges[which][int(at - ends[which])]


def right_tokens(
    model: GPT, tokenizer: Tokenizer, passages: I64, *, begins_documents: bool, micro_batch: int
) -> NDArray[np.bool_]:
    """Return (N, L) booleans: which tokens of each passage's second half come in their place. Deterministic.

    `begins_documents`: in training an end-of-document token preceded the passages, as in packed rows. Raises UserError
    if the model's output is not finite.
    """
    half = passages.shape[1] // 2
    cfg = GenerationConfig(max_tokens=half, temperature=0.0)
    before = [tokenizer.eod_id] if begins_documents else []
    written = np.full((len(passages), half), tokenizer.eod_id)  # what follows an end, and is none of a passage's tokens
    with progress_bar("reciting", total=len(passages), unit="passage") as bar:
        for first in range(0, len(passages), micro_batch):
            batch = passages[first : first + micro_batch, :half].tolist()
            for i, text in enumerate(complete(model, tokenizer, [before + context for context in batch], cfg)):
                written[first + i, : len(text.tokens)] = text.tokens
            bar.update(len(batch))
    right: NDArray[np.bool_] = written == passages[:, half:]
    return right


def recited(right: NDArray[np.bool_]) -> Recited:
    """Sum up which tokens came, (N, L)."""
    return Recited(len(right), float(right.all(1).mean()), float(right.mean()))
