"""Measure the validation loss on fixed windows, weighted exactly by token over all ranks.

Shapes: B micro_batch, T seq_len.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megagpt.data.loader import ValWindows, prefetched, rank_slice
from megagpt.data.text_bytes import text_bytes_by_source
from megagpt.distributed.collectives import sum_over_ranks
from megagpt.distributed.process_group import progress_bar, rank, world_size
from megagpt.model.loss import token_nats


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    loss: float  # nats per token
    tokens: int  # predicted
    bytes: int  # of the UTF-8 text that those tokens were made of

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text: comparable between tokenizers that lose no text."""
        return self.loss * self.tokens / (self.bytes * math.log(2)) if self.bytes else math.nan


def mean_of(found: Sequence[Evaluation], weights: Sequence[float] = ()) -> Evaluation:
    """Return the mean over the tokens of several sets, or with weights as if each had its share of them."""
    if len(found) == 1:
        return found[0]
    weights = weights or [one.tokens for one in found]
    shares = [weight / sum(weights) for weight in weights]
    tokens = sum(one.tokens for one in found)
    per_token = sum(share * one.bytes / one.tokens for share, one in zip(shares, found, strict=True))
    loss = sum(share * one.loss for share, one in zip(shares, found, strict=True))
    return Evaluation(loss, tokens, round(tokens * per_token))


def metrics_of_sets(found: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return the metrics of each validation set that has a name."""
    named = {name: one for name, one in found.items() if name}
    return {
        **{f"val/loss/{name}": one.loss for name, one in named.items()},
        **{f"val/perplexity/{name}": one.perplexity for name, one in named.items()},
        **{f"val/bits_per_byte/{name}": one.bits_per_byte for name, one in named.items()},
    }


def evaluate(
    model: nn.Module, windows: ValWindows, token_bytes: Tensor, *, micro_batch: int, sequence_parallel_size: int = 1
) -> Evaluation:
    """Evaluate an engine or a model on all ranks together. Collective.

    With sequence_parallel_size > 1, that many ranks take the same windows, each a slice of their positions.
    token_bytes (vocab_size,): how many bytes of text each token stands for, on the model's device; with a tokenizer
    that loses text, the bytes are those that the build counted.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=token_bytes.device)  # nats, tokens, bytes
    for scores in _scores(model, windows, token_bytes, micro_batch, sequence_parallel_size):
        totals += torch.stack([column.sum(dtype=torch.float64) for column in scores.columns])
    return _evaluation(sum_over_ranks(totals), windows)


def evaluate_by_source(
    model: nn.Module, windows: ValWindows, token_bytes: Tensor, *, micro_batch: int
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Evaluate a model on one rank; returns the result of all windows, and that of each source with tokens in them."""
    stream = windows.stream
    names = [source.name for source in stream.dataset.manifest.sources]
    totals = torch.zeros(3, dtype=torch.float64, device=token_bytes.device)
    by_source = torch.zeros(len(names), 3, dtype=torch.float64)
    row_ends, row_sources = stream.row_ends(), stream.row_sources()
    for scores in _scores(model, windows, token_bytes, micro_batch, 1):
        totals += torch.stack([column.sum(dtype=torch.float64) for column in scores.columns])
        rows = np.searchsorted(row_ends, scores.places(windows.seq_len), side="right")  # (B, T)
        sources = row_sources[np.minimum(rows, len(row_sources) - 1)]  # rows past the last window have no weight
        columns = torch.stack([column.double().cpu().flatten() for column in scores.columns], dim=1)
        by_source.index_add_(0, torch.from_numpy(sources.flatten()), columns)
    if windows.text_bytes is not None:
        by_source[:, 2] = torch.from_numpy(text_bytes_by_source(stream, 1, len(windows) * windows.seq_len + 1))
    found = zip(names, by_source.tolist(), strict=True)
    return _evaluation(totals, windows), {
        name: Evaluation(nats / tokens, int(tokens), round(n_bytes))
        for name, (nats, tokens, n_bytes) in found
        if tokens
    }


class _Scores(NamedTuple):
    """A micro-batch of windows from `first` on, of which each target has nats, a weight of 1 or 0, and bytes."""

    first: int
    columns: tuple[Tensor, Tensor, Tensor]  # each (B, T)

    def places(self, seq_len: int) -> np.ndarray:
        """Return the place of each target in the stream, (B, T): the first is one token after its window's start."""
        windows = self.first + np.arange(len(self.columns[0]))
        return windows[:, None] * seq_len + 1 + np.arange(seq_len)


@torch.no_grad()
def _scores(
    model: nn.Module, windows: ValWindows, token_bytes: Tensor, micro_batch: int, sequence_parallel_size: int
) -> Iterator[_Scores]:
    """Yield the scores of this rank's contiguous share of the windows; all ranks make equally many passes."""
    device = token_bytes.device
    replica, replicas = rank() // sequence_parallel_size, world_size() // sequence_parallel_size
    share = math.ceil(len(windows) / replicas)
    begin, end = replica * share, min((replica + 1) * share, len(windows))
    firsts = range(begin, begin + share, micro_batch)
    was_training = model.training
    model.eval()
    shape = (micro_batch, windows.seq_len + 1)
    positions = rank_slice(windows.seq_len, rank(), sequence_parallel_size)
    batches = prefetched(windows.fill, firsts, shape, device, document_end=windows.document_end, positions=positions)
    with progress_bar("evaluating", total=len(firsts), unit="batch") as bar:
        for first, (inputs, targets, documents) in zip(firsts, batches, strict=True):
            nats = model(inputs, documents=documents, score=token_nats(targets))  # (B, T)
            kept = (first + torch.arange(micro_batch, device=device) < end).unsqueeze(1).expand_as(targets)  # (B, T)
            yield _Scores(first, (nats.double() * kept, kept, token_bytes[targets] * kept))
            bar.update()
    model.train(was_training)


def _evaluation(totals: Tensor, windows: ValWindows) -> Evaluation:
    nats, n_tokens, n_bytes = totals.tolist()
    text_bytes = windows.text_bytes
    return Evaluation(nats / n_tokens, int(n_tokens), int(n_bytes) if text_bytes is None else text_bytes.bytes)


def unigram_entropy(counts: Tensor) -> float:
    """Return the nats per token of the best guess that ignores context: a model that learned anything is better."""
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log()).sum().item()
