"""Run the stages of a build in order (run_stages): each is a list of tasks on the files of the stage before."""

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_tools.config import BuildConfig, SourceConfig
from data_tools.dedup.lsh import DedupConfig
from data_tools.executor.progress import warn
from data_tools.executor.tasks import Done, Tasks, file_of, write_list
from data_tools.readers.work_units import WorkUnit
from data_tools.stages.cut_documents import cut_where_few
from data_tools.stages.deduplicate import find_clusters, find_contaminated
from data_tools.stages.extract import (
    describe_units,
    extract_all,
    given_units,
    text_bytes,
    why_nothing_is_left,
)
from data_tools.stages.lost_text import describe_lost_text, lost_text_of, measure_lost_text, share_to_measure
from data_tools.stages.select import SplitConfig, UnitInput
from data_tools.stages.shuffle import PASS_TOKENS, merge_down, write_shard
from data_tools.stages.tokenize import VariantConfig, tokenize
from data_tools.stages.train_tokenizer import MODEL, train_on
from data_tools.storage.token_files import TokenFile
from megagpt.atomic_files import write_atomically
from megagpt.data.manifest import SPLITS, Split
from megagpt.data.shard_format import ShardHeader, token_dtype
from megagpt.errors import UserError
from megagpt.terminal import builder_command
from megagpt.tokenizer.tokenizer import Tokenizer

ALPHA = {"unigram": 0.3, "bpe": 0.1}  # of subword variants, where the user gives none
KINDS: dict[str, Literal["unigram-sampling", "bpe-dropout"]] = {"unigram": "unigram-sampling", "bpe": "bpe-dropout"}


@dataclass
class Stages:
    """The finished tasks of a build, stage by stage."""

    units: list[WorkUnit]
    extracted: list[Done]  # of each unit
    splits: SplitConfig
    clusters: Path | None = None  # prefix of the clusters of duplicates
    unit_inputs: list[UnitInput] = field(default_factory=list)
    cut: int = 0  # documents that are cut into parts, because there are few
    model: Path = Path()
    sample_sha256: str | None = None
    lost_text: dict[str, Any] | None = None  # by a given tokenizer: see stages/lost_text.py
    variants: list[list[Done]] = field(default_factory=list)  # for each variant, its tokenized units
    shards: list[tuple[ShardHeader, Done]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokenized(self) -> list[Done]:
        """Return the units in the canonical tokenization."""
        return self.variants[0]

    @cached_property
    def units_of_sources(self) -> dict[int, list[int]]:
        """Return the numbers of the units of each source."""
        numbers: dict[int, list[int]] = defaultdict(list)
        for unit in self.unit_inputs:
            numbers[unit.source].append(unit.number)
        return numbers

    def count(self, split: Split, variant: int = 0, source: int | None = None) -> tuple[int, int, int]:
        """Return (documents, bytes, tokens) of a split, over all sources or of one."""
        numbers = range(len(self.unit_inputs)) if source is None else self.units_of_sources[source]
        rows = [self.variants[variant][number].result["counts"][split] for number in numbers]
        documents, size, tokens = (sum(column) for column in zip(*rows, strict=True)) if rows else (0, 0, 0)
        return documents, size, tokens


def run_stages(
    units: list[WorkUnit],
    sources: Sequence[SourceConfig],
    splits: SplitConfig,
    config: BuildConfig,
    given: Tokenizer | None,
    tasks: Tasks,
) -> Stages:
    """Run all stages; with a `given` tokenizer, none is trained."""
    stages = read_and_compare(units, sources, splits, config, tasks)
    find_tokenizer(stages, config, given, tasks)
    if given is not None and not given.is_lossless:
        stages.lost_text = _measure_lost_text(stages, given, tasks)
        if stages.lost_text["share"]:
            warn(describe_lost_text(stages.lost_text, config.tokenizer))
    tokenize_and_shuffle(stages, sources, config, tasks)
    return stages


def read_and_compare(
    units: list[WorkUnit], sources: Sequence[SourceConfig], splits: SplitConfig, config: BuildConfig, tasks: Tasks
) -> Stages:
    """Return the stages before tokenization: extract, decontaminate, deduplicate, cut long documents."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        extracted = extract_all(units, sources, config.strict, tasks)
    stages = Stages(units, extracted, splits, seconds=seconds)
    with _timed(seconds, "compare"):
        held_out = splits.given[1]
        contamination = [None] * held_out + find_contaminated(extracted[held_out:], config.decontamination, tasks)
        found = find_clusters(extracted, contamination, _dedup(config, splits.given), config.seed, tasks)
        stages.clusters = found.prefix if found else None
        described = describe_units(units, sources, extracted, contamination, tasks.folder)
        stages.unit_inputs, stages.cut = cut_where_few(described, extracted, found, splits, tasks)
    return stages


def find_tokenizer(stages: Stages, config: BuildConfig, given: Tokenizer | None, tasks: Tasks) -> None:
    """Put the tokenizer's model into the build's folder: the given one, or one trained on the training split."""
    with _timed(stages.seconds, "tokenizer"):
        if given is None:
            trained = train_on(stages.extracted, stages.unit_inputs, stages.clusters, stages.splits, config, tasks)
            stages.model, stages.sample_sha256 = file_of(trained.prefix, MODEL), trained.result["sample_sha256"]
        else:
            stages.model = tasks.folder / f"{given.sha256}.model"
            write_atomically(stages.model, given.model_bytes)


def _measure_lost_text(stages: Stages, given: Tokenizer, tasks: Tasks) -> dict[str, Any]:
    def measured(share: float) -> dict[str, Any]:
        rest = (stages.clusters, stages.splits, stages.model, given.sha256, share)
        jobs = [(unit, *rest) for unit in stages.unit_inputs]
        return lost_text_of(tasks.run(measure_lost_text, jobs, "measuring", text_bytes(stages.extracted)))

    found = measured(share_to_measure(sum(text_bytes(stages.extracted))))
    # where nearly all documents are dropped as copies, nothing of the few others may be drawn
    return found if found["measured"] else measured(1.0)


def tokenize_and_shuffle(stages: Stages, sources: Sequence[SourceConfig], config: BuildConfig, tasks: Tasks) -> None:
    """Run the stages from tokenization on. Raises UserError if the training split is empty."""
    tokenizer = Tokenizer.load(stages.model)
    with _timed(stages.seconds, "tokenize"):
        for variant in variant_configs(tokenizer, config):
            jobs = [
                (unit, stages.clusters, stages.model, tokenizer.sha256, variant, stages.splits)
                for unit in stages.unit_inputs
            ]
            stages.variants.append(tasks.run(tokenize, jobs, "tokenizing", text_bytes(stages.extracted)))
    _check_something_is_left(stages)
    with _timed(stages.seconds, "shuffle"):
        stages.shards = _write_shards(stages, sources, tokenizer, config, tasks)


def plan_splits(units: Sequence[WorkUnit], sources: Sequence[SourceConfig], config: BuildConfig) -> SplitConfig:
    """Return how the documents are split. Raises UserError for a fraction that the user gave and that has no effect."""
    given = given_units(units, sources)
    fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    is_given = {"val_fraction": given[1] > given[0], "test_fraction": given[0] > 0}
    for name, fraction in fractions.items():
        if fraction and (is_given[name] or given[-1] == len(units)):
            if name in config.model_fields_set:
                why = "the inputs give that split" if is_given[name] else "every input has a split of its own"
                raise UserError(f"{name}={fraction} has no effect, because {why}; remove it, or set {name}=0")
            fractions[name] = 0.0
    duplicates = _dedup(config, given).duplicates
    return SplitConfig(**fractions, duplicates=duplicates, seed=config.seed, given=given)


def _dedup(config: BuildConfig, given: tuple[int, int, int]) -> DedupConfig:
    """Return the rule for copies. With method none, copies still do not get from one given split into another."""
    if config.dedup.method == "none" and any(given):
        return DedupConfig(method="exact", duplicates="keep")
    return config.dedup


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def variant_configs(tokenizer: Tokenizer, config: BuildConfig) -> list[VariantConfig]:
    """Return the canonical tokenization, and the sampled ones that the user asks for.

    Raises UserError for a tokenizer that none can be sampled of.
    """
    if config.subword.variants and tokenizer.kind not in ALPHA:
        raise UserError(
            f"subword.variants has no effect with a {tokenizer.kind} tokenizer; remove it, or train unigram or bpe"
        )
    if config.subword.variants and not tokenizer.is_exact_in_parts:
        raise UserError(
            "subword.variants needs a tokenizer that encodes the words of a text as it encodes the whole; this one "
            f"adds a dummy prefix or has no byte fallback: train one with `{builder_command()} train-tokenizer`"
        )
    alpha = config.subword.alpha or ALPHA.get(tokenizer.kind, 0.0)
    drawn = [VariantConfig(number=n, alpha=alpha, seed=config.seed) for n in range(1, config.subword.variants + 1)]
    return [VariantConfig(), *drawn]


def _check_something_is_left(stages: Stages) -> None:
    wanted: tuple[Split, ...] = ("train",) if stages.splits.trains(len(stages.units)) else SPLITS
    if any(stages.count(split)[0] for split in wanted):
        return
    reasons = why_nothing_is_left(stages.extracted, stages.tokenized)
    held_out = [f"{split}_fraction=0" for split, share in stages.splits.shares.items() if share and split != "train"]
    way_out = f"give more input, or set {' and '.join(held_out)}" if held_out and not reasons else "give more input"
    raise UserError(f"no document is left to train on{reasons}; {way_out}")


def _write_shards(
    stages: Stages, sources: Sequence[SourceConfig], tokenizer: Tokenizer, config: BuildConfig, tasks: Tasks
) -> list[tuple[ShardHeader, Done]]:
    """Shuffle into shards; returns (header, finished task) of each, in the order of the index."""
    headers, jobs, sizes = [], [], []
    build_id = _sha256_json([config.pipeline(sources), input_sha256(stages), tokenizer.sha256])[:32]
    for split in SPLITS:
        for variant, tokenized in enumerate(stages.variants):
            n_tokens = stages.count(split, variant)[2]
            files = _token_files(stages.units, tokenized, tasks.folder)
            if n_tokens:
                files = merge_down(files, split, tokenizer.vocab_size, tasks)
            listed = tasks.run_one(write_list, [file.as_json() for file in files], what="listing")
            n_shards = math.ceil(n_tokens / config.shard_tokens)
            n_passes = math.ceil(n_tokens / max(n_shards, 1) / PASS_TOKENS)
            for shard in range(n_shards):
                headers.append(
                    ShardHeader(
                        build_id=build_id,
                        split=split,
                        variant=variant,
                        shard=shard,
                        dtype=token_dtype(tokenizer.vocab_size),
                        vocab_size=tokenizer.vocab_size,
                        eod_id=tokenizer.eod_id,
                        tokenizer_sha256=tokenizer.sha256,
                    )
                )
                jobs.append((headers[-1], n_shards, n_passes, listed.prefix))
                sizes.append(n_tokens // n_shards)
    return list(zip(headers, tasks.run(write_shard, jobs, "shuffling", sizes, "token"), strict=True))


def _token_files(units: Sequence[WorkUnit], tokenized: Sequence[Done], scratch: Path) -> list[TokenFile]:
    """Return the token files of all units, in order."""
    token_files: list[TokenFile] = []
    for unit, done in zip(units, tokenized, strict=True):
        inputs = [slice_.file.path for slice_ in unit.slices]
        stage = done.prefix.parent.relative_to(scratch)
        token_files += [TokenFile(str(stage / name), inputs) for name in done.result["parts"]]
    return token_files


def input_sha256(stages: Stages) -> str:
    """Return the hash of all documents that were read and kept, in order."""
    return _sha256_json([done.result["sha256"] for done in stages.extracted])


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
