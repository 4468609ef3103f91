"""The `build` command: inputs, tokenizer, tokens, shuffled shards, and last of all the manifest."""

import fcntl
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import sentencepiece

from data_tools.config import BuildConfig
from data_tools.read import InputFile, Unit, find_files, plan_units, size_of
from data_tools.report import describe_skipped, make_report
from data_tools.shard_writer import write_index
from data_tools.shuffle import write_shard
from data_tools.tokenization import Tally, tokenize_unit
from data_tools.tokenizer_training import Trained, train_on
from data_tools.workers import RunAll, start_workers
from megagpt.data_manifest import (
    BUILD_DIR,
    MANIFEST,
    SPLITS,
    Manifest,
    ShardInfo,
    SourceInfo,
    Split,
    SplitInfo,
    TokenizerInfo,
    Variant,
    write_manifest,
)
from megagpt.errors import UserError
from megagpt.files import sha256_of, write_atomically
from megagpt.shards import INDEX, REPORT, TOKENIZER_MODEL, ShardHeader, token_dtype
from megagpt.tokenizer import Tokenizer

OURS = (*SPLITS, TOKENIZER_MODEL, INDEX, REPORT)  # what an unfinished build leaves behind, besides BUILD_DIR
LOCK = "megagpt.lock"  # in BUILD_DIR: what tells our leftovers, which are deleted, from somebody's files


def build(inputs: Sequence[Path], out: Path, config: BuildConfig, scheduler: str | None = None) -> dict[str, Any]:
    """Text to a dataset folder; returns the report.

    The same input, options and library versions give the same shards, whatever the number of workers.
    """
    given = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    files = find_files(inputs, config)
    units = plan_units(files)
    seconds: dict[str, float] = {}
    with _claimed(out) as (folder, scratch):
        with start_workers(config.workers, scheduler, scratch, total_bytes=sum(map(size_of, units))) as run_all:
            with _timed(seconds, "tokenizer"):
                trained = Trained(given, None) if given else train_on(units, scratch, config, run_all)
                write_atomically(folder / TOKENIZER_MODEL, trained.tokenizer.model_bytes)
            with _timed(seconds, "tokenize"):
                tally = _tokenize(units, scratch, folder / TOKENIZER_MODEL, trained.tokenizer, config, run_all)
            with _timed(seconds, "shuffle"):
                build_id = _build_id(config, tally, trained.tokenizer)
                plan = _plan_shards(build_id, tally, trained.tokenizer, config)
                parts = [scratch / part for part in tally.parts]
                written = run_all(write_shard, [(*task, parts, folder) for task in plan], "shuffling")
        sources = _sources(inputs, files, tally)
        report = make_report(tally, sources, seconds)
        write_atomically(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
        index_sha256 = write_index(folder / INDEX, [row for _, rows in written for row in rows])
        manifest = Manifest(
            build_id=build_id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tool=f"data_tools with pyarrow {pa.__version__}, sentencepiece {sentencepiece.__version__}",
            tokenizer=_describe_tokenizer(trained),
            dtype=token_dtype(trained.tokenizer.vocab_size),
            splits=_describe_splits(tally, [info for info, _ in written]),
            index_sha256=index_sha256,
            report_sha256=sha256_of(folder / REPORT),
            other_files={},
            sources=sources,
            input_sha256=tally.input_sha256,
            pipeline=config.pipeline(),
        )
        write_manifest(folder, manifest)
    return report


@contextmanager
def _claimed(out: Path) -> Iterator[tuple[Path, Path]]:
    """(dataset folder, folder for temporary files), cleared of an unfinished build, for this process alone."""
    folder = out.absolute()
    scratch = folder / BUILD_DIR
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    _refuse_finished(folder)
    if folder.exists() and any(folder.iterdir()) and not (scratch / LOCK).is_file():
        raise UserError(f"--out {out} holds files that are no unfinished build; give another folder")
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another build is writing to --out {out}; wait for it or give another folder") from error
        _refuse_finished(folder)  # the build that held the lock may have ended just now
        for leftover in [folder / name for name in OURS] + [*scratch.iterdir()]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK:
                leftover.unlink(missing_ok=True)
        yield folder, scratch
        shutil.rmtree(scratch)


def _refuse_finished(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise UserError(f"--out {folder} holds a finished dataset; give another folder, or delete it first")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _tokenize(
    units: Sequence[Unit], scratch: Path, model: Path, tokenizer: Tokenizer, config: BuildConfig, run_all: RunAll
) -> Tally:
    tasks = [(unit, number, scratch, model, tokenizer.sha256, config) for number, unit in enumerate(units)]
    tallies = run_all(tokenize_unit, tasks, "tokenizing")
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    whole.input_sha256 = _sha256_json([tally.input_sha256 for tally in tallies])
    if not whole.total(split="train").documents:
        skipped = describe_skipped(whole)
        raise UserError(
            f"no document is left to train on; skipped {skipped}; give more input"
            if skipped
            else "no document is left to train on; give more input or smaller val_fraction and test_fraction"
        )
    return whole


def _build_id(config: BuildConfig, tally: Tally, tokenizer: Tokenizer) -> str:
    return _sha256_json([config.pipeline(), tally.input_sha256, tokenizer.sha256])[:32]


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plan_shards(
    build_id: str, tally: Tally, tokenizer: Tokenizer, config: BuildConfig
) -> list[tuple[ShardHeader, int]]:
    """(header, shards in its split) of every shard, in the order of the index."""
    plan = []
    for split in SPLITS:
        n_shards = math.ceil(tally.total(split=split).tokens / config.shard_tokens)
        for shard in range(n_shards):
            header = ShardHeader(
                build_id=build_id,
                split=split,
                variant=0,
                shard=shard,
                dtype=token_dtype(tokenizer.vocab_size),
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                tokenizer_sha256=tokenizer.sha256,
            )
            plan.append((header, n_shards))
    return plan


def _sources(inputs: Sequence[Path], files: Sequence[InputFile], tally: Tally) -> tuple[SourceInfo, ...]:
    return tuple(
        SourceInfo(
            name=path.resolve().name,
            files=sum(file.source == number for file in files),
            documents=tally.total(source=number).documents,
            bytes=tally.total(source=number).bytes,
        )
        for number, path in enumerate(inputs)
    )


def _describe_tokenizer(trained: Trained) -> TokenizerInfo:
    tokenizer = trained.tokenizer
    return TokenizerInfo(
        file=TOKENIZER_MODEL,
        sha256=tokenizer.sha256,
        type=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        normalizer=tokenizer.normalizer,
        sample_sha256=trained.sample_sha256,
    )


def _describe_splits(tally: Tally, shards: Sequence[ShardInfo]) -> dict[Split, SplitInfo]:
    splits = {}
    for split in SPLITS:
        total = tally.total(split=split)
        own = tuple(shard for shard in shards if shard.path.startswith(f"{split}/"))
        canonical = Variant(id=0, kind="canonical", tokens=total.tokens, shards=own)
        splits[split] = SplitInfo(documents=total.documents, bytes=total.bytes, variants=(canonical,))
    return splits
