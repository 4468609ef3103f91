"""The data mixture of a run: which datasets, weights, seq_len and batch sizes held from which sample on.

It is plain numbers that a checkpoint saves. Datasets are numbered in the order in which the run first used them, and
known by their fingerprint: their order in the run file does not matter, and one that is left out for a while and then
listed again continues where its reading stopped.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagpt.data.sampler import PERIOD, DatasetPosition, Sampler, Segment, shares_of
from megagpt.errors import UserError


@dataclass(frozen=True)
class Source:
    """A training dataset: where it was last seen, and the length of each variant of its train split.

    The length is in tokens, or for packed rows as PackedRows.n_tokens counts them.
    """

    path: str
    fingerprint: str
    n_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Batches:
    """The steps after first_step take global_batch samples each, starting at first_sample."""

    first_step: int
    first_sample: int
    global_batch: int


@dataclass(frozen=True)
class Mixture:
    """The datasets of a run, and its segments and batch sizes in order; a run that has not begun has none."""

    seed: int
    sources: tuple[Source, ...] = ()
    segments: tuple[Segment, ...] = ()
    batches: tuple[Batches, ...] = ()

    def continued(
        self,
        wanted: Sequence[tuple[Source, float]],
        *,
        step: int,
        sample: int,
        seq_len: int,
        global_batch: int,
        later: Sequence[tuple[int, int]] = (),
    ) -> "Mixture":
        """Return the mixture of a run that draws from these (dataset, weight) from `sample` on, where `step` ended.

        The next steps take global_batch samples each, those after the steps in `later` as many as stand there.

        Raises UserError for a dataset that was rebuilt under its old path, is listed twice or is too short, or whose
        weight is too small for one sample in a period.
        """
        self._check_not_rebuilt([source for source, _ in wanted])
        sources = _merged(self.sources, [source for source, _ in wanted])
        weights = {source.fingerprint: weight for source, weight in wanted}
        shares = shares_of([weights.get(source.fingerprint, 0.0) for source in sources])
        for source, share in zip(sources, shares, strict=True):
            if source.fingerprint in weights:
                _check_length(source, seq_len)
                _check_share(source, share, weights)
        mixture = replace(self, sources=sources)
        segment = Segment(sample, seq_len, shares, mixture.places(sample))
        return replace(
            mixture,
            segments=_followed_by(self.segments, segment),
            batches=_planned(self.batches, Batches(step, sample, global_batch), later),
        )

    def jumped(self, *, step: int, sample: int) -> "Mixture":
        """Return a mixture whose steps after `step` take samples from `sample` on, and never those in between."""
        past = tuple(b for b in self.batches if b.first_step < step)
        later = [(b.first_step, b.global_batch) for b in self.batches if b.first_step > step]
        new = Batches(step, sample, len(self.samples_of(step + 1)))
        return replace(self, batches=(*past, *_planned((), new, later)))

    def sampler(self, sample: int) -> Sampler:
        """Return the sampler of the segment that the sample lies in."""
        segment = next(s for s in reversed(self.segments) if s.first_sample <= sample)
        # Datasets that joined the run later have no share in this segment.
        absent = len(self.sources) - len(segment.shares)
        segment = replace(
            segment, shares=segment.shares + (0,) * absent, places=segment.places + (DatasetPosition(),) * absent
        )
        return Sampler(tuple(source.n_tokens for source in self.sources), segment, self.seed)

    def places(self, sample: int) -> tuple[DatasetPosition, ...]:
        """Return the position in each dataset before this sample."""
        return self.sampler(sample).places(sample) if self.segments else (DatasetPosition(),) * len(self.sources)

    def samples_of(self, step: int) -> range:
        """Return the samples that a step takes, over all ranks; the first step is 1."""
        batches = next(b for b in reversed(self.batches) if b.first_step < step)
        first = batches.first_sample + (step - 1 - batches.first_step) * batches.global_batch
        return range(first, first + batches.global_batch)

    def as_json(self) -> dict[str, Any]:
        """Return what a checkpoint saves: plain lists and numbers, a DatasetPosition as a list of its four."""
        plain = asdict(self)
        for segment in plain["segments"]:
            segment["places"] = [list(place.values()) for place in segment["places"]]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Mixture":
        return cls(
            plain["seed"],
            tuple(Source(s["path"], s["fingerprint"], tuple(s["n_tokens"])) for s in plain["sources"]),
            tuple(
                Segment(
                    s["first_sample"], s["seq_len"], tuple(s["shares"]), tuple(DatasetPosition(*p) for p in s["places"])
                )
                for s in plain["segments"]
            ),
            tuple(Batches(**b) for b in plain["batches"]),
        )

    def _check_not_rebuilt(self, wanted: list[Source]) -> None:
        """Refuse data that changed under its path: an accident, unless its owner gives it another path."""
        shares = self.segments[-1].shares if self.segments else ()
        now = {source.fingerprint for source in wanted}
        gone = {
            Path(source.path).absolute(): source.fingerprint
            for source, share in zip(self.sources, shares, strict=False)
            if share and source.fingerprint not in now
        }
        for source in wanted:
            before = gone.get(Path(source.path).absolute(), source.fingerprint)
            if before != source.fingerprint and all(source.fingerprint != known.fingerprint for known in self.sources):
                raise UserError(
                    f"dataset {source.path} was rebuilt since this run last read it (fingerprint {before[:12]} then, "
                    f"{source.fingerprint[:12]} now); restore it, or move the new data to another path, where it is "
                    "another dataset that the run can continue with"
                )


def _merged(known: tuple[Source, ...], wanted: list[Source]) -> tuple[Source, ...]:
    """Number the datasets: known ones keep their numbers and get their present paths, new ones follow."""
    now: dict[str, Source] = {}
    for source in wanted:
        if source.fingerprint in now:
            raise UserError(
                f"megagpt.data.train has one dataset twice, {now[source.fingerprint].path} and {source.path}: "
                "list it once, with the sum of the weights"
            )
        now[source.fingerprint] = source
    return (*(now.pop(source.fingerprint, source) for source in known), *now.values())


def _followed_by(segments: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """Append a segment, unless it draws as the last one. It replaces those that begin at its sample or after."""
    if segments and _same_draws(segments[-1], new):
        return segments
    return (*(segment for segment in segments if segment.first_sample < new.first_sample), new)


def _same_draws(before: Segment, now: Segment) -> bool:
    shares = before.shares + (0,) * (len(now.shares) - len(before.shares))
    return (before.seq_len, shares) == (now.seq_len, now.shares)


def _planned(before: tuple[Batches, ...], now: Batches, later: Sequence[tuple[int, int]]) -> tuple[Batches, ...]:
    """Replace the batches planned after `now` by `now` and `later`."""
    past = tuple(b for b in before if b.first_sample < now.first_sample)
    batches = past if past and past[-1].global_batch == now.global_batch else (*past, now)
    for first_step, global_batch in later:
        steps = first_step - now.first_step
        now = Batches(first_step, now.first_sample + steps * now.global_batch, global_batch)
        batches = (*batches, now)
    return batches


def _check_length(source: Source, seq_len: int) -> None:
    if (n := min(source.n_tokens)) < 2 * seq_len + 1:
        raise UserError(
            f"training dataset {source.path} has {n} tokens, too few for two samples of {seq_len}, which need "
            f"{2 * seq_len + 1}; set megagpt.data.seq_len to {max(1, (n - 1) // 2)}, or build more data"
        )


def _check_share(source: Source, share: int, weights: dict[str, float]) -> None:
    if share == 0:
        raise UserError(
            f"training dataset {source.path} has weight {weights[source.fingerprint]} of {sum(weights.values())}: "
            f"less than one sample in {PERIOD}; raise its weight or leave it out"
        )
