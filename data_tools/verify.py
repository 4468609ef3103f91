"""The `verify` command: read every byte of a dataset, and report what has changed since it was built, and where."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_tools.executor.progress import Progress, advance, listening, watched
from data_tools.formatting import format_bytes
from megagpt.atomic_files import sha256_of
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.manifest import ShardInfo, Split, confined
from megagpt.data.shard_format import REPORT, batch_xxh3, read_batch
from megagpt.errors import UserError

IndexRow = dict[str, Any]


def verify(folder: Path) -> str:
    """Return one line about the intact dataset. Raises UserError with every finding about a damaged one."""
    dataset = open_dataset(folder)  # checks manifest, index, tokenizer.model, and each shard's size
    with watched("verifying provenance and rejects"):
        findings = [*_check_other_files(dataset), *_check_tokenizer(dataset)]
    shards = list(_shards(dataset))
    progress = Progress("verifying", [shard.info.bytes for shard in shards], unit="B")
    with progress.shown():
        for number, shard in enumerate(shards):
            with listening(partial(progress.add, number)):
                findings += _check_shard(dataset, shard)
            progress.finish(number)
    if findings:
        advice = "restore the damaged files or build the dataset again"
        raise UserError("\n".join([f"{folder} is damaged:", *findings, advice]))
    n_bytes, n_tokens = sum(shard.info.bytes for shard in shards), sum(shard.info.tokens for shard in shards)
    return f"{folder} is whole: {len(shards)} shards, {n_tokens:,} tokens, {format_bytes(n_bytes)} read"


class Shard(NamedTuple):
    """A shard's entries in the manifest and the index."""

    split: Split
    variant: int
    number: int
    info: ShardInfo
    rows: list[IndexRow]


def _shards(dataset: Dataset) -> Iterator[Shard]:
    for split, content in dataset.manifest.splits.items():
        for variant in content.variants:
            rows = defaultdict(list)
            for row in dataset.index_rows(split, variant.id):
                rows[row["shard"]].append(row)
            for number, info in enumerate(variant.shards):
                yield Shard(split, variant.id, number, info, rows[number])


def _check_other_files(dataset: Dataset) -> Iterator[str]:
    manifest = dataset.manifest
    for name, sha256 in {REPORT: manifest.report_sha256, **manifest.other_files}.items():
        path = confined(dataset.path, name)
        if not path.is_file() or sha256_of(path) != sha256:
            yield f"{path}: missing or changed"


def _check_tokenizer(dataset: Dataset) -> Iterator[str]:
    tokenizer, info = dataset.tokenizer(), dataset.manifest.tokenizer
    if (tokenizer.vocab_size, tokenizer.eod_id) != (info.vocab_size, info.eod_id):
        yield f"{dataset.path / info.file}: its vocabulary or end-of-document id is not the manifest's"


def _check_shard(dataset: Dataset, shard: Shard) -> list[str]:
    path = dataset.path / shard.info.path
    findings, documents, tokens = [], 0, 0
    try:
        reader = dataset.open_shard(shard.split, shard.variant, shard.number)
        for row in shard.rows:
            batch = read_batch(reader, row["batch"], path)
            advance(batch.nbytes)
            where = f"{path}: record batch {row['batch']} (tokens from {row['tok0']:,} of {shard.split})"
            findings += [f"{where} {problem}" for problem in _check_batch(batch, row, dataset)]
            documents += int(np.count_nonzero(batch["part"].to_numpy() == 0))
            tokens += row["n_tokens"]
    except UserError as error:
        findings.append(str(error))
    if not findings and (documents, tokens) != (shard.info.documents, shard.info.tokens):
        findings.append(f"{path}: the index and the manifest disagree on its documents or tokens")
    if not findings and sha256_of(path) != shard.info.sha256:
        findings.append(f"{path}: its bytes changed, outside the documents")
    return findings


def _check_batch(batch: pa.RecordBatch, row: IndexRow, dataset: Dataset) -> Iterator[str]:
    if batch_xxh3(batch) != row["xxh3"]:
        yield "has changed"
        return
    tokens = batch["tokens"].values.to_numpy()
    ends = batch["tokens"].offsets.to_numpy()[1:]
    # a row is its document's last if the next row has part 0; the batch's last row may or may not be
    is_last = np.append(batch["part"].to_numpy()[1:] == 0, tokens[-1:] == dataset.eod_id)
    if (len(batch), len(tokens)) != (row["n_rows"], row["n_tokens"]):
        yield "is not as long as the index says"
    elif tokens.max() >= dataset.vocab_size:
        yield f"holds the id {tokens.max()}, beyond the vocabulary of {dataset.vocab_size}"
    elif not np.array_equal(np.flatnonzero(tokens == dataset.eod_id) + 1, ends[is_last]):
        yield "holds a document that does not end in, or is interrupted by, the end-of-document id"
