"""The data loader: micro-batches on the device, prefetched from memory-mapped shards by one thread.

Shapes: B micro_batch, T seq_len.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.config.batch import BatchPlan
from megagpt.config.schema import DataConfig
from megagpt.config.validation_sets import ValidationSetConfig
from megagpt.data.dataset import Dataset, TokenStream
from megagpt.data.loss_mask import BatchTransform, Fill, Row
from megagpt.data.text_bytes import TextBytes, text_bytes
from megagpt.data.training_set import open_datasets
from megagpt.errors import UserError


class Batch(NamedTuple):
    """A micro-batch on the device."""

    inputs: Tensor  # (B, T) int64, or this rank's slice of the T positions
    targets: Tensor  # as inputs; IGNORE where there is no loss
    documents: Tensor | None  # (B, T): a number for each document of a row; None: attention crosses documents

    def in_rows_of(self, length: int) -> "Batch":
        """Return the same tokens with each row cut into rows of `length`, which divides T; targets stay as they are."""
        if length == self.inputs.size(1):
            return self
        return Batch(*(None if part is None else part.reshape(-1, length) for part in self))  # type: ignore[arg-type]


class ValWindows:
    """The first windows of a validation split, in order: the same ones at every evaluation."""

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        max_tokens: int | None = None,
        *,
        document_end: int | None = None,
        option: str = "megagpt.data.val_tokens=",
    ) -> None:
        """`document_end` is the end-of-document id, for a model that was trained with attention within documents.

        `option` is how the user gave max_tokens.
        """
        available = (stream.n_tokens - 1) // seq_len
        wanted = available if max_tokens is None else max_tokens // seq_len
        if max_tokens is not None and 0 == wanted < available:
            raise UserError(f"{option}{max_tokens} is less than one window of {seq_len} tokens; give {option}{seq_len}")
        if not 0 < wanted <= available:
            asked = "at least one window" if max_tokens is None else f"{option}{max_tokens}"
            shorter = f"lower megagpt.model.seq_len to {max(1, stream.n_tokens - 1)} or less, or "
            if available:
                way_out = f"give {option}{available * seq_len}, or "
            else:
                way_out = shorter if option.startswith("megagpt.") else ""  # `evaluate` has a trained model's seq_len
            raise UserError(
                f"too little validation data in {stream.dataset.path} for {asked}: {stream.n_tokens:,} tokens are "
                f"{available} windows of {seq_len}; {way_out}build the data with a larger val_fraction"
            )
        self.stream, self.seq_len, self.document_end = stream, seq_len, document_end
        self.n_windows = wanted

    def fill(self, first: int, rows: Row) -> None:
        """Rows past the last window repeat the first one; evaluate() gives them no weight."""
        for i, row in enumerate(rows):
            window = first + i if first + i < self.n_windows else 0
            self.stream.copy(window * self.seq_len, row)

    def __len__(self) -> int:
        return self.n_windows

    @cached_property
    def text_bytes(self) -> TextBytes | None:
        """Return the bytes of text of all targets; None if the tokenizer loses none: then the tokens have as many."""
        if self.stream.dataset.tokenizer().is_lossless:
            return None
        return text_bytes(self.stream, 1, self.n_windows * self.seq_len + 1)


@dataclass(frozen=True)
class ValidationSet:
    """A dataset and those of its windows that are measured."""

    dataset: Dataset
    windows: ValWindows


def open_data(cfg: DataConfig, seq_len: int, *, masked: bool = False) -> tuple[dict[str, ValidationSet], list[Dataset]]:
    """Open the validation sets, in windows of the model's whole seq_len, and the training datasets.

    Whatever the packing, these are windows of the plain stream; `masked` keeps attention within documents there too.
    Raises UserError for a missing, unfinished or damaged dataset, too little data, two tokenizers, or a validation set
    that is given twice.
    """
    paths = [*(d.path for d in cfg.train), *(one.path for one in cfg.val.values())]
    datasets = open_datasets(paths)
    train, val = datasets[: len(cfg.train)], datasets[len(cfg.train) :]
    sets: dict[str, ValidationSet] = {}
    for (name, one), dataset in zip(cfg.val.items(), val, strict=True):
        if twin := next((other for other in sets if sets[other].dataset.fingerprint == dataset.fingerprint), None):
            raise UserError(f"megagpt.data.val has one dataset twice, as {twin} and as {name}: {one.path}; remove one")
        sets[name] = ValidationSet(dataset, _val_windows(name, one, cfg, dataset, seq_len, masked=masked))
    return sets, train


def _val_windows(
    name: str, one: ValidationSetConfig, cfg: DataConfig, dataset: Dataset, seq_len: int, *, masked: bool
) -> ValWindows:
    stream = dataset.stream("val")
    # A shard of another build fails here, and not on one rank in the middle of a run.
    stream.open_all()
    windows = ValWindows(
        stream,
        seq_len,
        one.tokens or cfg.val_tokens,
        document_end=dataset.eod_id if masked else None,
        option=f"megagpt.data.val.{name}.tokens=" if name else "megagpt.data.val_tokens=",
    )
    _ = windows.text_bytes  # read here, so that a damaged file fails now and not at the first evaluation
    return windows


def rank_samples(batch: BatchPlan, rank: int, global_batches: Iterable[range]) -> Iterator[int]:
    """Yield the first sample of each of this rank's micro-batches, from these global batches one after the other."""
    for samples in global_batches:
        yield from rank_share(samples, batch, rank)[:: batch.micro_batch]


def rank_share(samples: range, batch: BatchPlan, rank: int) -> range:
    """Return those samples of a global batch that this rank reads.

    A global batch is the same set of samples on any number of ranks. Each data-parallel rank takes a contiguous share
    of it; the ranks of a sequence-parallel group take the same one.
    """
    share = len(samples) // batch.replicas
    begin = rank // batch.sequence_parallel_size * share
    return samples[begin : begin + share]


def rank_slice(T: int, rank: int, sequence_parallel_size: int) -> slice:
    """Return the slice of a sequence's T positions that this rank computes (all without sequence parallelism)."""
    share = T // sequence_parallel_size
    begin = rank % sequence_parallel_size * share
    return slice(begin, begin + share)


def prefetched(
    fill: Fill,
    firsts: Iterable[int],
    shape: tuple[int, int],
    device: torch.device,
    *,
    transform: BatchTransform | None = None,
    document_end: int | None = None,
    positions: slice = slice(None),
) -> Iterator[Batch]:
    """Yield micro-batches on the device; while one is in use, a thread copies the next into pinned memory.

    `shape` is (B, T + 1), of the rows that `fill` writes. `transform` makes inputs and targets of them; without it they
    are two views of the rows. `positions` is the slice that this rank computes.
    A micro-batch is valid until the next one is taken: its memory is then overwritten.
    """
    on_gpu = device.type == "cuda"
    B, T = shape[0], shape[1] - 1
    slots = [torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
    targets_of = [torch.empty((B, T), dtype=torch.int64, pin_memory=on_gpu) for _ in range(2 if transform else 0)]
    sent: list[torch.cuda.Event | None] = [None, None]

    def load(slot: int, first: int) -> int:
        if (event := sent[slot]) is not None:
            event.synchronize()  # the copy to the device may still be reading this slot
        rows = slots[slot].numpy()
        fill(first, rows)
        if transform is not None:
            transform(first, rows, targets_of[slot].numpy())
        return slot

    def send(slot: int) -> Batch:
        rows = slots[slot].to(device, non_blocking=True)  # no copy on a CPU
        targets = targets_of[slot].to(device, non_blocking=True) if targets_of else rows[:, 1:]
        if on_gpu:
            sent[slot] = torch.cuda.Event()
            sent[slot].record()  # type: ignore[union-attr]
        inputs = rows[:, :-1]
        documents = None if document_end is None else document_numbers(inputs, document_end)
        return Batch(inputs[:, positions], targets[:, positions], documents)

    def use_own_gpu() -> None:
        if on_gpu:
            torch.cuda.set_device(device)  # a thread starts on GPU 0, whichever its process uses

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
    """Number the documents of inputs (B, T). An end-of-document id counts to the next one, whose token it predicts."""
    return (inputs == eod_id).cumsum(1)
