"""The training data of a run: TrainingSet turns a sample's number into its tokens.

It imports no torch, so that tools that only read data start fast.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
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

DRAW = 16384  # samples whose spans are computed at once, because a single one takes nearly as long


@dataclass(frozen=True)
class SampleSpan:
    """A run of consecutive inputs of a sample: `tokens`, which begin at token `start` of a variant of the train split.

    A packed row has a span for each of its chunks.
    """

    dataset: Dataset
    variant: int
    epoch: int
    start: int
    tokens: NDArray[np.int64]


OpenVariant = Callable[[Dataset, int], Tokens]


def train_variant(dataset: Dataset, variant: int) -> Tokens:
    """Open a variant of the train split as it is: the OpenVariant of a run without packed rows and goldfish loss."""
    return dataset.stream("train", variant)


def row_opener(cfg: MegaGPTConfig) -> OpenVariant:
    """Return how a run reads a variant: with goldfish marks if it asks for them, and packed by its method.

    The function opens, and packs, each variant once.
    """

    @cache
    def open_variant(dataset: Dataset, variant: int) -> Tokens:
        stream = dataset.stream("train", variant)
        goldfish = cfg.augment.goldfish
        tokens = GoldfishTokens(stream, dataset.eod_id, goldfish) if goldfish.k else stream
        return PACKING[cfg.packing.kind].tokens(tokens, stream.document_lengths, cfg.seq_len, dataset.eod_id)

    return open_variant


@dataclass(frozen=True)
class DrawnSamples:
    """Samples drawn at once: sample samples[i] is the spans first[i] to last[i], each `length` inputs from `start`.

    The columns are plain lists, which are faster than numpy for one number at a time.
    """

    samples: range
    first: list[int]
    last: list[int]
    streams: list[Tokens]
    start: list[int]
    length: list[int]


class TrainingSet:
    """The training datasets of a run as one endless, shuffled sequence of samples.

    `datasets` are those of the run file, from which samples are drawn from now on; `earlier` are those that only past
    samples of the run lie in.
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
        self._drawn = DrawnSamples(range(0), [], [], [], [], [])

    def open_all(self) -> None:
        """Open every shard now, so that one of another build fails here and not on one rank in the middle of a run."""
        for streams in self._streams:
            for stream in streams:
                stream.open_all()

    def jumped(self, *, step: int, sample: int) -> "TrainingSet":
        """Return the same data for a run whose steps after `step` take their samples from `sample` on (a roll-back).

        `Mixture.jumped` changes no segment, so the open streams and the samplers serve the new one too.
        """
        other = copy(self)
        other.mixture = self.mixture.jumped(step=step, sample=sample)
        return other

    def fill(self, first: int, rows: Row) -> None:
        """Write samples first, first + 1, ... into the rows of an array (B, seq_len + 1).

        Where a sample has several spans, the target of each span's last input is the next span's first token.
        """
        end = first + len(rows)
        while first < end:
            drawn = self._drawn_with(first)
            i, n = first - drawn.samples.start, min(end, drawn.samples.stop) - first
            for row, at, last in zip(rows[:n], drawn.first[i : i + n], drawn.last[i : i + n], strict=True):
                while at < last:
                    drawn.streams[at].copy(drawn.start[at], row[: drawn.length[at]])
                    row = row[drawn.length[at] :]
                    at += 1
                # The last span fills the rest of the row: its inputs, and the one token more that is only a target.
                drawn.streams[last].copy(drawn.start[last], row)
            first, rows = first + n, rows[n:]

    def spans(self, sample: int) -> list[SampleSpan]:
        """Return where the inputs of a sample, past or future, lie and what they are.

        Raises UserError if the dataset of a past sample is no longer there.
        """
        drawn, spans = self._samplers[self._segment(sample)].draw(sample, 1), []
        columns = (drawn.dataset, drawn.epoch, drawn.start, drawn.length)
        for k, epoch, start, length in zip(*(column.tolist() for column in columns), strict=True):
            variant = epoch % len(self.mixture.sources[k].n_tokens)
            stream = self._variants(k)[variant]
            dataset = self._by_fingerprint[self.mixture.sources[k].fingerprint]
            for at, tokens in _runs_of_tokens(stream, start, length):
                spans.append(SampleSpan(dataset, variant, epoch, at, unmarked(tokens)))
        return spans

    def place(self, sample: int) -> tuple[int, int, int]:
        """Return the dataset, by its number in the mixture, the variant and the place in it where a sample begins.

        The place is the sampler's: of packed rows it is the row's number.
        """
        drawn = self._samplers[self._segment(sample)].draw(sample, 1)
        k, epoch, start = (int(column[0]) for column in (drawn.dataset, drawn.epoch, drawn.start))
        return k, epoch % len(self.mixture.sources[k].n_tokens), start

    def epochs(self, sample: int) -> list[float]:
        """Return how many epochs of each of `datasets` come before this sample, as a fraction."""
        done = self._samplers[self._segment(sample)].epochs(sample)
        by_fingerprint = {source.fingerprint: n for source, n in zip(self.mixture.sources, done, strict=True)}
        return [by_fingerprint[dataset.fingerprint] for dataset in self.datasets]

    def packing(self) -> list[str]:
        """Report how full the rows are: one line for each variant whose documents are packed."""
        streams = [
            (source.path, variant, stream)
            for source, variants in zip(self.mixture.sources, self._streams, strict=True)
            for variant, stream in enumerate(variants)
        ]
        return [f"{path}, variant {v}: {s.plan}" for path, v, s in streams if isinstance(s, PackedRows)]

    def describe(self, sample: int, seq_len: int) -> str:
        """Describe the mixture from this sample on in one line: seq_len, and the share and epoch of each dataset."""
        segment = self._samplers[self._segment(sample)].segment
        shares = {
            source.fingerprint: share / PERIOD
            for source, share in zip(self.mixture.sources, segment.shares, strict=True)
        }
        by_dataset = [
            f"{shares[dataset.fingerprint]:.2%} from {dataset.path} (epoch {epoch:.3f})"
            for dataset, epoch in zip(self.datasets, self.epochs(sample), strict=True)
        ]
        return f"{seq_len} tokens, " + ", ".join(by_dataset)

    def _variants(self, k: int) -> list[Tokens]:
        if not self._streams[k]:
            source = self.mixture.sources[k]
            raise UserError(
                f"dataset {source.path} (fingerprint {source.fingerprint[:12]}) of these samples is no longer there; "
                "restore it to see them"
            )
        return self._streams[k]

    def _segment(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1

    def _drawn_with(self, sample: int) -> DrawnSamples:
        """Draw the DRAW samples around this one that are of its segment, unless they are the ones drawn last."""
        if sample not in self._drawn.samples:
            segment, begin = self._segment(sample), sample // DRAW * DRAW
            first, end = max(begin, self._firsts[segment]), min([begin + DRAW, *self._firsts[segment + 1 :]])
            drawn = self._samplers[segment].draw(first, end - first)
            by_dataset = {k: self._variants(k) for k in np.unique(drawn.dataset).tolist()}
            variants = zip(drawn.dataset.tolist(), drawn.epoch.tolist(), strict=True)
            self._drawn = DrawnSamples(
                range(first, end),
                drawn.begin[:-1].tolist(),
                (drawn.begin[1:] - 1).tolist(),
                [by_dataset[k][epoch % len(by_dataset[k])] for k, epoch in variants],
                drawn.start.tolist(),
                drawn.length.tolist(),
            )
        return self._drawn


class OtherTokenizerError(UserError):
    """Two datasets of a run have different tokenizers, which is wrong on any machine."""


def open_datasets(paths: Sequence[Path]) -> list[Dataset]:
    """Open datasets of one tokenizer. Raises UserError for a missing, unfinished or damaged one, or two tokenizers."""
    datasets = [open_dataset(path) for path in paths]
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise OtherTokenizerError(
                f"{other.path} was tokenized with another model than {first.path} "
                f"(sha256 {other.manifest.tokenizer.sha256[:12]} and {first.manifest.tokenizer.sha256[:12]}); "
                f"build it again with tokenizer={first.path / first.manifest.tokenizer.file}"
            )
    return datasets


def source_of(dataset: Dataset, open_variant: OpenVariant | None = None) -> Source:
    """Return a dataset as a mixture records it, with the length of each variant of its train split.

    The manifest counts tokens; with `open_variant` the lengths are those of what it opens, which may be packed rows.
    """
    variants = dataset.variants("train")
    tokens = tuple(open_variant(dataset, v.id).n_tokens if open_variant else v.tokens for v in variants)
    return Source(str(dataset.path), dataset.fingerprint, tokens)


def _runs_of_tokens(stream: Tokens, start: int, length: int) -> list[tuple[int, Row]]:
    """Return (place in the stream, tokens) of `length` positions from `start`, which may stand for one packed row."""
    if isinstance(stream, PackedRows):
        return stream.chunks(start)
    tokens = np.empty(length, dtype=np.int64)
    stream.copy(start, tokens)
    return [(start, tokens)]


def earlier_datasets(mixture: Mixture, datasets: Sequence[Dataset]) -> list[Dataset]:
    """Open the datasets of a mixture that its run no longer uses, as far as they still exist unchanged."""
    found = []
    for source in mixture.sources:
        if all(source.fingerprint != dataset.fingerprint for dataset in datasets):
            try:
                dataset = open_dataset(Path(source.path))
            except UserError:
                continue
            if dataset.fingerprint == source.fingerprint:
                found.append(dataset)
    return found
