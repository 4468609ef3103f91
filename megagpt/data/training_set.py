"""From a sample's number to its tokens. Free of torch, so that tools that only read data start fast."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagpt.config.schema import MegaGPTConfig
from megagpt.data.augmentation import GoldfishTokens
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.loss_mask import Row, Tokens, unmarked
from megagpt.data.mixture import Mixture, Source
from megagpt.data.packing import PACKING, PackedRows
from megagpt.data.sampler import PERIOD
from megagpt.errors import UserError

DRAW = 16384  # samples whose windows are computed at once: the arithmetic is vectorized, a single one is dear


@dataclass(frozen=True)
class SampleSpan:
    """Consecutive inputs of a sample: `tokens`, which begin at token `start` of this variant of the train split.

    Of a packed row: a document, or a chunk of one.
    """

    dataset: Dataset
    variant: int
    epoch: int
    start: int
    tokens: NDArray[np.int64]


OpenVariant = Callable[[Dataset, int], Tokens]


def train_variant(dataset: Dataset, variant: int) -> Tokens:
    return dataset.stream("train", variant)


def row_opener(cfg: MegaGPTConfig) -> OpenVariant:
    """How a run reads a variant: as it is, marked as the goldfish says, or packed. Each is opened and planned once."""

    @cache
    def open_variant(dataset: Dataset, variant: int) -> Tokens:
        stream = dataset.stream("train", variant)
        goldfish = cfg.augment.goldfish
        tokens = GoldfishTokens(stream, dataset.eod_id, goldfish) if goldfish.k else stream
        return PACKING[cfg.packing.kind].tokens(tokens, stream.document_lengths, cfg.seq_len, dataset.eod_id)

    return open_variant


@dataclass(frozen=True)
class DrawnSamples:
    """Samples drawn at once, as plain lists: sample i is stretches first[i] to last[i] of `length` inputs each."""

    samples: range
    first: list[int]
    last: list[int]
    streams: list[Tokens]
    start: list[int]
    length: list[int]


class TrainingSet:
    """The training datasets of a run as one endless, shuffled sequence of samples.

    `datasets` are those of the run file, in which the samples to come lie; what the run drew before may lie in
    `earlier` ones.
    """

    def __init__(
        self,
        mixture: Mixture,
        datasets: Sequence[Dataset],
        *,
        earlier: Sequence[Dataset] = (),
        open_variant: OpenVariant = train_variant,
    ) -> None:
        self.mixture = mixture
        self.datasets = datasets
        self._by_fingerprint = {dataset.fingerprint: dataset for dataset in (*datasets, *earlier)}
        self._streams = [
            [open_variant(self._by_fingerprint[source.fingerprint], v) for v in range(len(source.n_tokens))]
            if source.fingerprint in self._by_fingerprint
            else []
            for source in mixture.sources
        ]
        self._firsts = [segment.first_sample for segment in mixture.segments]
        self._samplers = [mixture.sampler(first) for first in self._firsts]
        self._block = DrawnSamples(range(0), [], [], [], [], [])

    def open_all(self) -> None:
        """Open every shard now: one of another build is found here, not by one rank in the middle of a run."""
        for streams in self._streams:
            for stream in streams:
                stream.open_all()

    def fill(self, first: int, rows: Row) -> None:
        """Samples first, first + 1, ... into rows of seq_len + 1 tokens.

        Where a sample is made of several stretches, the target of each one's last input is the next one's first token.
        """
        end = first + len(rows)
        while first < end:
            block = self._block_of(first)
            i, n = first - block.samples.start, min(end, block.samples.stop) - first
            for row, at, last in zip(rows[:n], block.first[i : i + n], block.last[i : i + n], strict=True):
                while at < last:
                    block.streams[at].copy(block.start[at], row[: block.length[at]])
                    row = row[block.length[at] :]
                    at += 1
                block.streams[last].copy(block.start[last], row)
            first, rows = first + n, rows[n:]

    def pieces(self, sample: int) -> list[SampleSpan]:
        """Where the inputs of a sample, past or to come, lie and what they are; raises UserError for a dataset gone."""
        drawn, pieces = self._samplers[self._segment(sample)].draw(sample, 1), []
        columns = (drawn.dataset, drawn.epoch, drawn.start, drawn.length)
        for k, epoch, start, length in zip(*(column.tolist() for column in columns), strict=True):
            variant = epoch % len(self.mixture.sources[k].n_tokens)
            stream = self._variants(k)[variant]
            dataset = self._by_fingerprint[self.mixture.sources[k].fingerprint]
            for at, tokens in _pieces(stream, start, length):
                pieces.append(SampleSpan(dataset, variant, epoch, at, unmarked(tokens)))
        return pieces

    def epochs(self, sample: int) -> list[float]:
        """Passes over each of the datasets before this sample."""
        done = self._samplers[self._segment(sample)].epochs(sample)
        by_fingerprint = {source.fingerprint: n for source, n in zip(self.mixture.sources, done, strict=True)}
        return [by_fingerprint[dataset.fingerprint] for dataset in self.datasets]

    def packing(self) -> list[str]:
        """How full the rows are: a line for each variant whose documents are packed."""
        streams = [
            (source.path, variant, stream)
            for source, variants in zip(self.mixture.sources, self._streams, strict=True)
            for variant, stream in enumerate(variants)
        ]
        return [f"{path}, variant {v}: {s.plan}" for path, v, s in streams if isinstance(s, PackedRows)]

    def describe(self, sample: int, seq_len: int) -> str:
        """Of what the samples of seq_len tokens from this one on are made."""
        segment = self._samplers[self._segment(sample)].segment
        shares = {
            source.fingerprint: share / PERIOD
            for source, share in zip(self.mixture.sources, segment.shares, strict=True)
        }
        parts = [
            f"{shares[dataset.fingerprint]:.2%} from {dataset.path} (epoch {epoch:.3f})"
            for dataset, epoch in zip(self.datasets, self.epochs(sample), strict=True)
        ]
        return f"{seq_len} tokens, " + ", ".join(parts)

    def _variants(self, k: int) -> list[Tokens]:
        if not self._streams[k]:
            source = self.mixture.sources[k]
            raise UserError(
                f"these samples were drawn from {source.path} (fingerprint {source.fingerprint[:12]}), which is no "
                "longer there; restore it to see them"
            )
        return self._streams[k]

    def _segment(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1

    def _block_of(self, sample: int) -> DrawnSamples:
        """The DRAW samples around this one, as far as its segment goes."""
        if sample not in self._block.samples:
            segment, begin = self._segment(sample), sample // DRAW * DRAW
            first, end = max(begin, self._firsts[segment]), min([begin + DRAW, *self._firsts[segment + 1 :]])
            drawn = self._samplers[segment].draw(first, end - first)
            by_dataset = {k: self._variants(k) for k in np.unique(drawn.dataset).tolist()}
            variants = zip(drawn.dataset.tolist(), drawn.epoch.tolist(), strict=True)
            self._block = DrawnSamples(
                range(first, end),
                drawn.begin[:-1].tolist(),
                (drawn.begin[1:] - 1).tolist(),
                [by_dataset[k][epoch % len(by_dataset[k])] for k, epoch in variants],
                drawn.start.tolist(),
                drawn.length.tolist(),
            )
        return self._block


def open_datasets(paths: Sequence[Path]) -> list[Dataset]:
    """Raises UserError for a missing, unfinished or damaged dataset, and for two tokenizers."""
    datasets = [open_dataset(path) for path in paths]
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise UserError(
                f"{other.path} was tokenized with another model than {first.path} "
                f"(sha256 {other.manifest.tokenizer.sha256[:12]} and {first.manifest.tokenizer.sha256[:12]}); "
                f"build it again with tokenizer={first.path / first.manifest.tokenizer.file}"
            )
    return datasets


def plan_mixture(
    cfg: MegaGPTConfig, global_batch: int, sources: Sequence[Source], history: Mixture, *, step: int, sample: int
) -> Mixture:
    """The mixture of a run whose `data.train` entries are `sources`, from its step and sample on.

    `history` is what the run drew before: `Mixture(seed)` for a new one. Raises UserError.
    """
    return history.going_on(
        [(source, d.weight) for source, d in zip(sources, cfg.data.train, strict=True)],
        step=step,
        sample=sample,
        seq_len=PACKING[cfg.packing.kind].window(cfg.seq_len),
        global_batch=global_batch,
    )


def source_of(dataset: Dataset, open_variant: OpenVariant | None = None) -> Source:
    """Its tokens as the manifest counts them, or as what `open_variant` makes of them does: see PackedRows."""
    variants = dataset.variants("train")
    tokens = tuple(open_variant(dataset, v.id).n_tokens if open_variant else v.tokens for v in variants)
    return Source(str(dataset.path), dataset.fingerprint, tokens)


def _pieces(stream: Tokens, start: int, length: int) -> list[tuple[int, Row]]:
    """Where in the stream the tokens of a stretch, or of a packed row, lie, and the tokens."""
    if isinstance(stream, PackedRows):
        return stream.chunks(start)
    tokens = np.empty(length, dtype=np.int64)
    stream.copy(start, tokens)
    return [(start, tokens)]
