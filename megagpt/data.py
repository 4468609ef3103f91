"""Micro-batches on the device: rows of tokens copied from memory-mapped shards, one micro-batch ahead.

Shapes: B micro_batch, T seq_len. A micro-batch is (B, T + 1): inputs are its first T columns, targets its last T.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagpt.config import BatchPlan, DataConfig
from megagpt.errors import UserError
from megagpt.samples import open_datasets
from megagpt.shards import Dataset, TokenStream

Fill = Callable[[int, NDArray[np.int64]], None]
"""Fill(first, rows) writes samples first, first + 1, ... into the rows of a (B, T + 1) array."""


class ValBlocks:
    """The first blocks of a validation split, in order: the same ones at every evaluation."""

    def __init__(self, stream: TokenStream, seq_len: int, max_tokens: int | None = None) -> None:
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
        self._stream, self.seq_len = stream, seq_len
        self.n_blocks = wanted

    def fill(self, first: int, rows: NDArray[np.int64]) -> None:
        """Rows past the last block repeat the first one; evaluate() gives them no weight."""
        for i, row in enumerate(rows):
            block = first + i if first + i < self.n_blocks else 0
            self._stream.copy(block * self.seq_len, row)

    def __len__(self) -> int:
        return self.n_blocks


def open_data(cfg: DataConfig, seq_len: int) -> tuple[ValBlocks, list[Dataset]]:
    """Validation blocks of the model's whole seq_len, and all datasets: training's in order, validation's last.

    Raises UserError for a missing, unfinished or damaged dataset, too little data, or two tokenizers.
    """
    datasets = open_datasets([*(d.path for d in cfg.train), cfg.val])
    val = datasets[-1].stream("val")
    val.open_all()  # a shard of another build is found here, not by one rank in the middle of a run
    return ValBlocks(val, seq_len, cfg.val_tokens), datasets


def rank_samples(batch: BatchPlan, rank: int, first: int) -> Iterator[int]:
    """The first sample of each of this rank's micro-batches, endlessly, from the global batch at sample `first`.

    A global batch is the same set of samples on any number of ranks; each rank takes a contiguous share of it.
    """
    share = batch.global_batch // batch.world_size
    for step in count():
        begin = first + step * batch.global_batch + rank * share
        yield from range(begin, begin + share, batch.micro_batch)


def prefetched(fill: Fill, firsts: Iterable[int], shape: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """(B, T + 1) micro-batches on the device; while one is in use, a thread copies the next into pinned memory.

    A micro-batch is valid until the next one is taken: its memory is then written again.
    """
    on_gpu = device.type == "cuda"
    slots = [torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
    sent: list[torch.cuda.Event | None] = [None, None]

    def load(slot: int, first: int) -> Tensor:
        if (event := sent[slot]) is not None:
            event.synchronize()  # the copy to the device that still reads this slot
        fill(first, slots[slot].numpy())
        return slots[slot]

    def use_own_gpu() -> None:
        if on_gpu:
            torch.cuda.set_device(device)  # a thread begins on GPU 0, whichever its process uses

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=use_own_gpu) as pool:
        pending = None
        for i, first in enumerate(firsts):
            following = pool.submit(load, i % 2, first)
            if pending is not None:
                yield _to_device(pending.result(), device, sent, (i - 1) % 2)
            pending = following
        if pending is not None:
            yield _to_device(pending.result(), device, sent, i % 2)


def _to_device(batch: Tensor, device: torch.device, sent: list[torch.cuda.Event | None], slot: int) -> Tensor:
    if device.type != "cuda":
        return batch
    on_device = batch.to(device, non_blocking=True)
    sent[slot] = torch.cuda.Event()
    sent[slot].record()  # type: ignore[union-attr]
    return on_device
