"""The `build` command: claim the folder, run the stages (stages/pipeline.py), publish, and write the manifest last.

A killed build that is started again resumes: finished tasks are not run a second time (executor/tasks.py).
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.config import BuildConfig, SourceConfig
from data_tools.executor.progress import warn, watched
from data_tools.executor.tasks import Tasks
from data_tools.executor.workers import start_workers
from data_tools.publish import publish
from data_tools.report.summary import make_report
from data_tools.stages.deduplicate import check_files
from data_tools.stages.extract import find_units, warn_of_names
from data_tools.stages.pipeline import KINDS, Stages, input_sha256, plan_splits, run_stages, variant_configs
from megagpt.atomic_files import sha256_of
from megagpt.data.manifest import (
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
from megagpt.data.shard_format import REPORT, TOKENIZER_MODEL, token_dtype
from megagpt.errors import UserError
from megagpt.file_lock import FileLock, LockHeldError
from megagpt.tokenizer.tokenizer import Tokenizer

LOCK = "megagpt.lock"  # in BUILD_DIR: by it we recognize an unfinished build, whose files may be deleted


def build(
    inputs: Sequence[str | Path],
    out: Path,
    config: BuildConfig,
    scheduler: str | None = None,
    *,
    val: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
    command: str = "",
) -> dict[str, Any]:
    """Build a dataset folder from text; returns the report. All documents of `val` and `test` are held out.

    The report tells the `command`, if there is one.

    The same input, options and library versions give the same shards, with any number of workers and however often the
    build was interrupted. Raises UserError for a mistake in any of the arguments.
    """
    given = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if given is not None:
        variant_configs(given, config)  # refused now, and not after hours of reading
    sources = config.with_inputs(list(map(str, inputs)), val=list(map(str, val)), test=list(map(str, test)))
    with watched("looking at the first record of each file"):
        units = find_units(sources, leave_out=out, strict=config.strict)
    splits = plan_splits(units, sources, config)
    if warning := warn_of_names(units, sources):
        warn(warning)
    if given is None and not splits.trains(len(units)):
        raise UserError(
            "all is held out, which leaves nothing to train a tokenizer on; give tokenizer=MODEL or --input"
        )
    check_files(config.decontamination)
    with _claimed(out) as (folder, scratch), _told_to_resume(out):
        with start_workers(config.workers, scheduler, scratch, total_bytes=sum(unit.size for unit in units)) as run_all:
            stages = run_stages(units, sources, splits, config, given, Tasks(scratch, run_all))
        with watched("writing the dataset and its report"):
            return finish(folder, stages, sources, config, command)


def finish(
    folder: Path, stages: Stages, sources: Sequence[SourceConfig], config: BuildConfig, command: str = ""
) -> dict[str, Any]:
    """Make a dataset of what the stages wrote: publish the files, then write the manifest. Returns the report."""
    tokenizer = Tokenizer.load(stages.model)
    library = "sentencepiece" if tokenizer.tokenizer_json is None else "tokenizers"
    report = make_report(stages, sources, config, command)
    other_files, index_sha256 = publish(folder, stages, report)
    manifest = Manifest(
        build_id=stages.shards[0][0].build_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=f"data_tools with pyarrow {pa.__version__}, {library} {version(library)}",
        tokenizer=_describe_tokenizer(tokenizer, stages.sample_sha256),
        dtype=token_dtype(tokenizer.vocab_size),
        splits=_describe_splits(stages, tokenizer),
        index_sha256=index_sha256,
        report_sha256=sha256_of(folder / REPORT),
        other_files=other_files,
        sources=_describe_sources(stages, sources),
        input_sha256=input_sha256(stages),
        pipeline=config.pipeline(sources),
        cut_documents=stages.cut,
    )
    write_manifest(folder, manifest)
    return report


@contextmanager
def _told_to_resume(out: Path) -> Iterator[None]:
    """Add to the message of an error what is kept, and how to resume."""
    how = f"What is done is kept in {out / BUILD_DIR}: run the command again, corrected, to resume, or delete {out}"
    how += " to start over"
    try:
        yield
    except Exception as error:
        if not any((out / BUILD_DIR).glob("*/*.json")):
            raise
        if isinstance(error, UserError):
            raise UserError(f"{error}\n{how}") from error
        error.add_note(how)
        raise


@contextmanager
def _claimed(out: Path) -> Iterator[tuple[Path, Path]]:
    """Lock (dataset folder, scratch folder in it) for this process; the scratch folder is deleted after success.

    Raises UserError if the folder is used by another build, finished, or contains files of another origin.
    """
    folder = out.absolute()
    scratch = folder / BUILD_DIR
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    is_ours = (folder / MANIFEST).is_file() or (scratch / LOCK).is_file()
    if folder.exists() and any(folder.iterdir()) and not is_ours:
        raise UserError(f"--out {out} holds files that are not an unfinished build; give another folder")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be created: {error.strerror}; give another folder") from error
    lock = FileLock(scratch / LOCK)
    try:
        warning = lock.take()
    except LockHeldError as held:
        raise UserError(f"another build is writing to --out {out}, {held}; wait, or give another folder") from held
    except OSError as error:  # the build that held it has just removed its scratch folder
        raise UserError(f"--out {out} cannot be locked: {error}; look whether another build finished it") from error
    if warning:
        warn(f"{warning}, so a second build to --out {out} may not be refused: start none")
    try:
        # a build that was killed right after its manifest leaves its scratch folder, to be deleted here
        is_finished = (folder / MANIFEST).exists()
        if not is_finished:
            yield folder, scratch
    finally:
        lock.release()
    # After the release, because NFS keeps a deleted file that is open, and its folder then cannot be removed. Whoever
    # takes the lock from here on sees the manifest, and only deletes this folder too.
    shutil.rmtree(scratch, ignore_errors=True)
    if scratch.exists():
        warn(f"{scratch} could not be deleted; the dataset is complete without it: delete it")
    if is_finished:
        raise UserError(f"--out {out} holds a finished dataset; give another folder, or delete it first")


def _describe_sources(stages: Stages, sources: Sequence[SourceConfig]) -> tuple[SourceInfo, ...]:
    described = []
    for number, source in enumerate(sources):
        counts = [stages.count(split, source=number) for split in SPLITS]
        files = {slice_.file.path for i in stages.units_of_sources[number] for slice_ in stages.units[i].slices}
        described.append(
            SourceInfo(
                name=source.name,
                files=len(files),
                documents=sum(documents for documents, _, _ in counts),
                bytes=sum(size for _, size, _ in counts),
            )
        )
    return tuple(described)


def _describe_tokenizer(tokenizer: Tokenizer, sample_sha256: str | None) -> TokenizerInfo:
    return TokenizerInfo(
        file=TOKENIZER_MODEL,
        sha256=tokenizer.sha256,
        type=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        normalizer=tokenizer.normalizer,
        sample_sha256=sample_sha256,
    )


def _describe_splits(stages: Stages, tokenizer: Tokenizer) -> dict[Split, SplitInfo]:
    splits = {}
    for split in SPLITS:
        documents, size, _ = stages.count(split)
        variants = []
        for number in range(len(stages.variants) if split == "train" else 1):
            shards = [
                ShardInfo(**done.result["info"] | {"path": header.path})
                for header, done in stages.shards
                if (header.split, header.variant) == (split, number)
            ]
            kind = KINDS[tokenizer.kind] if number else "canonical"
            tokens = stages.count(split, number)[2]
            variants.append(Variant(id=number, kind=kind, tokens=tokens, shards=tuple(shards)))
        splits[split] = SplitInfo(documents=documents, bytes=size, variants=tuple(variants))
    return splits
