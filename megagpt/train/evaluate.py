"""Measure the validation loss on fixed windows, weighted exactly by token over all ranks.

Shapes: B micro_batch, T seq_len.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt.data.loader import ValWindows, prefetched, rank_slice
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


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: ValWindows, token_bytes: Tensor, *, micro_batch: int, sequence_parallel_size: int = 1
) -> Evaluation:
    """Evaluate an engine or a model: each rank takes a contiguous share of the windows, all run equally many passes.

    Collective. With sequence_parallel_size > 1, that many ranks take the same windows, each a slice of their
    positions. token_bytes (vocab_size,): how many bytes of text each token stands for, on the model's device; with a
    tokenizer that loses text, the bytes are those that the build counted.
    """
    device = token_bytes.device
    replica, replicas = rank() // sequence_parallel_size, world_size() // sequence_parallel_size
    share = math.ceil(len(windows) / replicas)
    begin, end = replica * share, min((replica + 1) * share, len(windows))
    firsts = range(begin, begin + share, micro_batch)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    was_training = model.training
    model.eval()
    shape = (micro_batch, windows.seq_len + 1)
    positions = rank_slice(windows.seq_len, rank(), sequence_parallel_size)
    batches = prefetched(windows.fill, firsts, shape, device, document_end=windows.document_end, positions=positions)
    with progress_bar("evaluating", total=len(firsts), unit="batch") as bar:
        for first, (inputs, targets, documents) in zip(firsts, batches, strict=True):
            nats = model(inputs, documents=documents, score=token_nats(targets))  # (B, T)
            kept = (first + torch.arange(micro_batch, device=device) < end).unsqueeze(1).expand_as(targets)  # (B, T)
            totals[0] += (nats.double() * kept).sum()
            totals[1] += kept.sum()
            totals[2] += (token_bytes[targets] * kept).sum()
            bar.update()
    model.train(was_training)
    nats_sum, n_tokens, n_bytes = sum_over_ranks(totals).tolist()
    text_bytes = windows.text_bytes
    return Evaluation(nats_sum / n_tokens, int(n_tokens), int(n_bytes) if text_bytes is None else text_bytes.bytes)


def unigram_entropy(counts: Tensor) -> float:
    """Return the nats per token of the best guess that ignores context: a model that learned anything is better."""
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log()).sum().item()
