"""Micro-batches on the device: rows of tokens copied from memory-mapped shards, one micro-batch ahead.

Shapes: B micro_batch, T seq_len.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.config.batch import BatchPlan
from megagpt.config.schema import DataConfig
from megagpt.data.dataset import Dataset, TokenStream
from megagpt.data.loss_mask import BatchTransform, Fill, Row
from megagpt.data.training_set import open_datasets
from megagpt.errors import UserError


class Batch(NamedTuple):
    """A micro-batch on the device."""

    inputs: Tensor  # (B, T) int64, or this rank's share of the positions
    targets: Tensor  # as inputs; IGNORE where there is no loss
    documents: Tensor | None  # (B, T), numbered in each row; None: attention crosses documents


class ValBlocks:
    """The first blocks of a validation split, in order: the same ones at every evaluation."""

    def __init__(
        self, stream: TokenStream, seq_len: int, max_tokens: int | None = None, *, document_end: int | None = None
    ) -> None:
        """document_end is the id behind which attention begins anew, for a model that was trained so."""
        available = (stream.n_tokens - 1) // seq_len
        wanted = available if max_tokens is None else max_tokens // seq_len
        if not 0 < wanted <= available:
            asked = "at least one block" if max_tokens is None else f"data.val_tokens={max_tokens}"
            raise UserError(
                f"too little validation data for {asked}: {stream.n_tokens:,} tokens are {available} blocks of "
                f"seq_len={seq_len}; "
                + (f"set val_tokens to {available * seq_len}, or " if available else "")
                + ("" if available else f"lower seq_len to {max(1, stream.n_tokens - 1)} or less, or ")
                + "build the data with a larger val_fraction"
            )
        self._stream, self.seq_len, self.document_end = stream, seq_len, document_end
        self.n_blocks = wanted

    def fill(self, first: int, rows: Row) -> None:
        """Rows past the last block repeat the first one; evaluate() gives them no weight."""
        for i, row in enumerate(rows):
            block = first + i if first + i < self.n_blocks else 0
            self._stream.copy(block * self.seq_len, row)

    def __len__(self) -> int:
        return self.n_blocks


def open_data(cfg: DataConfig, seq_len: int, *, masked: bool = False) -> tuple[ValBlocks, list[Dataset]]:
    """Validation blocks of the model's whole seq_len, and all datasets: training's in order, validation's last.

    The blocks are windows of the stream with every packing; `masked` keeps attention within documents there too.

    Raises UserError for a missing, unfinished or damaged dataset, too little data, or two tokenizers.
    """
    datasets = open_datasets([*(d.path for d in cfg.train), cfg.val])
    val = datasets[-1].stream("val")
    val.open_all()  # a shard of another build is found here, not by one rank in the middle of a run
    document_end = datasets[-1].eod_id if masked else None
    return ValBlocks(val, seq_len, cfg.val_tokens, document_end=document_end), datasets


def rank_samples(batch: BatchPlan, rank: int, first: int) -> Iterator[int]:
    """The first sample of each of this rank's micro-batches, endlessly, from the global batch at sample `first`.

    A global batch is the same set of samples on any number of ranks; each rank takes a contiguous share of it,
    and ranks that share their samples' positions the same one.
    """
    share = batch.global_batch // batch.replicas
    for step in count():
        begin = first + step * batch.global_batch + rank // batch.sequence_parallel_size * share
        yield from range(begin, begin + share, batch.micro_batch)


def rank_slice(T: int, rank: int, sequence_parallel_size: int) -> slice:
    """Of T positions those that are this rank's: all, or a share in the order of neighboring ranks."""
    share = T // sequence_parallel_size
    begin = rank % sequence_parallel_size * share
    return slice(begin, begin + share)


def prefetched(
    fill: Fill,
    firsts: Iterable[int],
    shape: tuple[int, int],
    device: torch.device,
    *,
    rework: BatchTransform | None = None,
    document_end: int | None = None,
    positions: slice = slice(None),
) -> Iterator[Batch]:
    """Micro-batches on the device; while one is in use, a thread copies the next into pinned memory.

    shape is (B, T + 1), of the rows that `fill` writes. Without a `rework` inputs and targets are two views of them.
    `positions` are those that this rank computes, if not all.
    A micro-batch is valid until the next one is taken: its memory is then written again.
    """
    on_gpu = device.type == "cuda"
    B, T = shape[0], shape[1] - 1
    slots = [torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
    reworked = [torch.empty((B, T), dtype=torch.int64, pin_memory=on_gpu) for _ in range(2 if rework else 0)]
    sent: list[torch.cuda.Event | None] = [None, None]

    def load(slot: int, first: int) -> int:
        if (event := sent[slot]) is not None:
            event.synchronize()  # the copy to the device that still reads this slot
        rows = slots[slot].numpy()
        fill(first, rows)
        if rework is not None:
            rework(first, rows, reworked[slot].numpy())
        return slot

    def send(slot: int) -> Batch:
        rows = slots[slot].to(device, non_blocking=True)  # on a CPU no copy
        targets = reworked[slot].to(device, non_blocking=True) if reworked else rows[:, 1:]
        if on_gpu:
            sent[slot] = torch.cuda.Event()
            sent[slot].record()  # type: ignore[union-attr]
        inputs = rows[:, :-1]
        documents = None if document_end is None else document_numbers(inputs, document_end)
        return Batch(inputs[:, positions], targets[:, positions], documents)

    def use_own_gpu() -> None:
        if on_gpu:
            torch.cuda.set_device(device)  # a thread begins on GPU 0, whichever its process uses

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=use_own_gpu) as pool:
        pending = None
        for i, first in enumerate(firsts):
            following = pool.submit(load, i % 2, first)
            if pending is not None:
                yield send(pending.result())
            pending = following
        if pending is not None:
            yield send(pending.result())


def document_numbers(inputs: Tensor, eod_id: int) -> Tensor:
    """(B, T): the end of a document, as an input, begins the next one, since the token it predicts is that one's."""
    return (inputs == eod_id).cumsum(1)
