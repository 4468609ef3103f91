"""Score continuations by a model: how likely their tokens are after a context, in batches that the ranks divide.

Shapes: B continuations at once, T positions.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from math import ceil, isfinite
from typing import NamedTuple, TypeVar

import torch

from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import progress_bar, rank, world_size
from megagpt.errors import UserError
from megagpt.model.generate import evaluating
from megagpt.model.gpt import GPT
from megagpt.model.loss import target_scores

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Continuation(NamedTuple):
    """Token ids to score, of which there is at least one, after those of a context, at least one too."""

    context: Sequence[int]
    ids: Sequence[int]


class Scored(NamedTuple):
    """Holds the sum of the tokens' log probabilities, and whether each of them is the likeliest in its place."""

    log_probability: float
    is_greedy: bool


def score_continuations(
    model: GPT, wanted: Sequence[Continuation], *, vocab_size: int, micro_batch: int
) -> list[Scored]:
    """Score continuations, each of at most seq_len tokens. Collective: the ranks divide them, and all return all.

    A context that is too long for the model loses its beginning. Raises UserError, on every rank, if the model's output
    is not finite.
    """
    longest_first = sorted(range(len(wanted)), key=lambda i: -len(wanted[i].context) - len(wanted[i].ids))
    batches = [longest_first[first : first + micro_batch] for first in range(0, len(wanted), micro_batch)]
    with progress_bar("scoring", total=ceil(len(batches) / world_size()), unit="batch") as bar, evaluating(model):

        def scored(batch: list[int]) -> list[Scored]:
            bar.update()
            return _score_batch(model, [wanted[i] for i in batch], vocab_size)

        found = dict(zip(longest_first, chain.from_iterable(over_ranks(batches, scored)), strict=True))
    if not all(isfinite(one.log_probability) for one in found.values()):
        raise UserError("the model's output is not finite, so nothing can be scored; use an earlier checkpoint")
    return [found[i] for i in range(len(wanted))]


def over_ranks(batches: Sequence[Batch], run: Callable[[Batch], list[Result]]) -> list[list[Result]]:
    """Run each batch on one rank, and return the results of all on every rank, in their order. Collective.

    All ranks run equally many, since at ZeRO-3 each forward pass is collective: some repeat the last batch.
    """
    rounds = ceil(len(batches) / world_size())
    own = [run(batches[min(i * world_size() + rank(), len(batches) - 1)]) for i in range(rounds)]
    by_rank = gather_objects(own)
    return [by_rank[i % world_size()][i // world_size()] for i in range(len(batches))]


@torch.no_grad()
def _score_batch(model: GPT, batch: Sequence[Continuation], vocab_size: int) -> list[Scored]:
    # The last token is a target only, so seq_len + 1 tokens fit the positions.
    rows = [[*one.context, *one.ids][-(model.cfg.seq_len + 1) :] for one in batch]
    longest = max(map(len, rows))
    # What pads a row comes after all that is scored, which does not see it.
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.wte.weight.device)
    inputs, targets = padded[:, :-1], padded[:, 1:]  # (B, T) each
    # With caches each rank computes all positions, uncompiled: every batch has another length.
    scores = model(
        inputs, model.new_caches(len(batch), longest - 1), score=target_scores(targets, vocab_size)
    )  # (2, B, T)
    found = []
    for row, one, (log_p, is_likeliest) in zip(rows, batch, scores.cpu().unbind(1), strict=True):
        own = slice(len(row) - 1 - len(one.ids), len(row) - 1)
        found.append(Scored(log_p[own].double().sum().item(), bool(is_likeliest[own].all())))
    return found
