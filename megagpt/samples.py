"""From a sample's number to its tokens. Free of torch, so that tools that only read data start fast."""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megagpt.commits import Saved, newest_record
from megagpt.config import MegaGPTConfig
from megagpt.errors import UserError
from megagpt.mixture import Mixture, Source
from megagpt.sampler import PERIOD
from megagpt.shards import Dataset, TokenStream, open_dataset
from megagpt.state import TrainState

DRAW = 4096  # samples whose windows are computed at once: the arithmetic is vectorized, a single one is dear


@dataclass(frozen=True)
class Piece:
    """Consecutive inputs of a sample: `tokens`, which begin at token `start` of this variant of the train split."""

    dataset: Dataset
    variant: int
    epoch: int
    start: int
    tokens: NDArray[np.int64]


def train_variant(dataset: Dataset, variant: int) -> TokenStream:
    return dataset.stream("train", variant)


class TrainData:
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
        open_variant: Callable[[Dataset, int], TokenStream] = train_variant,
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
        self._drawn = range(0)
        self._begin: list[int] = []
        self._stretches: list[tuple[int, int, int, int]] = []  # dataset, epoch, start, length

    def fill(self, first: int, rows: NDArray[np.int64]) -> None:
        """Samples first, first + 1, ... into rows of seq_len + 1 tokens.

        Where a sample is made of several stretches, the target of each one's last input is the next one's first token.
        """
        for sample, row in enumerate(rows, first):
            *broken_off, last = self._of(sample)
            rest = row
            for k, epoch, start, length in broken_off:
                self._stream(k, epoch).copy(start, rest[:length])
                rest = rest[length:]
            k, epoch, start, _ = last
            self._stream(k, epoch).copy(start, rest)

    def open_all(self) -> None:
        """Open every shard now: one of another build is found here, not by one rank in the middle of a run."""
        for streams in self._streams:
            for stream in streams:
                stream.open_all()

    def pieces(self, sample: int) -> list[Piece]:
        """Where the inputs of a sample, past or to come, lie and what they are; raises UserError for a dataset gone."""
        pieces = []
        for k, epoch, start, length in self._of(sample):
            source = self.mixture.sources[k]
            if not (streams := self._streams[k]):
                raise UserError(
                    f"sample {sample} was drawn from {source.path} (fingerprint {source.fingerprint[:12]}), which is "
                    "no longer there; restore it to see the sample"
                )
            variant = epoch % len(streams)
            tokens = np.empty(length, dtype=np.int64)
            streams[variant].copy(start, tokens)
            pieces.append(Piece(self._by_fingerprint[source.fingerprint], variant, epoch, start, tokens))
        return pieces

    def epochs(self, sample: int) -> list[float]:
        """Passes over each of the datasets before this sample."""
        done = self._samplers[self._segment(sample)].epochs(sample)
        by_fingerprint = {source.fingerprint: n for source, n in zip(self.mixture.sources, done, strict=True)}
        return [by_fingerprint[dataset.fingerprint] for dataset in self.datasets]

    def describe(self, sample: int) -> str:
        """Of what the samples from this one on are made."""
        segment = self.mixture.sampler(sample).segment
        shares = {
            source.fingerprint: share / PERIOD
            for source, share in zip(self.mixture.sources, segment.shares, strict=True)
        }
        parts = [
            f"{shares[dataset.fingerprint]:.2%} from {dataset.path} (epoch {epoch:.3f})"
            for dataset, epoch in zip(self.datasets, self.epochs(sample), strict=True)
        ]
        return f"{segment.seq_len} tokens, " + ", ".join(parts)

    def _stream(self, k: int, epoch: int) -> TokenStream:
        streams = self._streams[k]
        return streams[epoch % len(streams)]

    def _segment(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1

    def _of(self, sample: int) -> list[tuple[int, int, int, int]]:
        if sample not in self._drawn:
            self._draw(sample)
        i = sample - self._drawn.start
        return self._stretches[self._begin[i] : self._begin[i + 1]]

    def _draw(self, sample: int) -> None:
        """The block of DRAW samples around this one, as far as its segment goes."""
        segment, block = self._segment(sample), sample // DRAW * DRAW
        first, end = max(block, self._firsts[segment]), min([block + DRAW, *self._firsts[segment + 1 :]])
        drawn = self._samplers[segment].draw(first, end - first)
        columns = (drawn.dataset, drawn.epoch, drawn.start, drawn.length)
        self._begin = drawn.begin.tolist()
        self._stretches = list(zip(*(column.tolist() for column in columns), strict=True))
        self._drawn = range(first, end)


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


def plan_mixture(cfg: MegaGPTConfig, global_batch: int, sources: Sequence[Source], saved: Saved | None) -> Mixture:
    """Of a run that goes on from a saved step, or begins, with its data.train as `sources`. Raises UserError."""
    history, state = (saved.mixture, saved.state) if saved else (Mixture(cfg.data.seed), TrainState())
    return history.going_on(
        [(source, d.weight) for source, d in zip(sources, cfg.data.train, strict=True)],
        step=state.step,
        sample=state.samples_seen,
        seq_len=cfg.seq_len,
        global_batch=global_batch,
    )


def source_of(dataset: Dataset) -> Source:
    tokens = tuple(variant.tokens for variant in dataset.variants("train"))
    return Source(str(dataset.path), dataset.fingerprint, tokens)


def open_run(out_dir: Path) -> TrainData:
    """The samples that a run has drawn and would draw next, from its folder alone and without its engine.

    Raises UserError if it is no run's folder, or the run file's data is not there.
    """
    file = out_dir / "run.json"
    try:
        raw = json.loads(file.read_bytes())
        cfg, global_batch = MegaGPTConfig.model_validate(raw["megagpt"]), int(raw["train_batch_size"])
    except FileNotFoundError:
        raise UserError(f"{out_dir} is not the folder of a run: it has no run.json") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{file} is damaged or of another version: {error}") from error
    return open_samples(cfg, global_batch, newest_record(out_dir))


def open_samples(cfg: MegaGPTConfig, global_batch: int, saved: Saved | None) -> TrainData:
    """All samples, past and to come, of a run that stands at a saved step or has yet to begin. Raises UserError."""
    datasets = open_datasets([d.path for d in cfg.data.train])
    mixture = plan_mixture(cfg, global_batch, [source_of(d) for d in datasets], saved)
    return TrainData(mixture, datasets, earlier=_earlier(mixture, datasets))


def _earlier(mixture: Mixture, datasets: Sequence[Dataset]) -> list[Dataset]:
    """Datasets that the run has left, as far as they still are what they were."""
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
