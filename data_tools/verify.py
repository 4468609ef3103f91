"""The `verify` command: reads every byte of a dataset and says what is not as the build left it, and where."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_tools.report import human
from megagpt.data_manifest import ShardInfo, Split
from megagpt.errors import UserError
from megagpt.files import sha256_of
from megagpt.shards import REPORT, Dataset, batch_xxh3, open_dataset, read_batch

Row = dict[str, Any]  # of the index


def verify(folder: Path) -> str:
    """One line that says all is well, or a UserError with every finding."""
    dataset = open_dataset(folder)  # manifest, index, tokenizer.model, and each shard's size
    findings = [*_check_report(dataset), *_check_tokenizer(dataset)]
    shards = list(_shards(dataset))
    for split, number, info, rows in tqdm(shards, desc="verifying", unit="shard", delay=2, disable=None):
        findings += _check_shard(dataset, split, number, info, rows)
    if findings:
        advice = "restore the damaged files or build the dataset again"
        raise UserError("\n".join([f"{folder} is damaged:", *findings, advice]))
    n_bytes, n_tokens = sum(info.bytes for _, _, info, _ in shards), sum(info.tokens for _, _, info, _ in shards)
    return f"{folder} is whole: {len(shards)} shards, {n_tokens:,} tokens, {human(n_bytes)} read"


def _shards(dataset: Dataset) -> Iterator[tuple[Split, int, ShardInfo, list[Row]]]:
    """(split, number, what the manifest says, what the index says) of every shard."""
    for split, content in dataset.manifest.splits.items():
        rows = defaultdict(list)
        for row in dataset.index_rows(split):
            rows[row["shard"]].append(row)
        for number, info in enumerate(content.variants[0].shards):
            yield split, number, info, rows[number]


def _check_report(dataset: Dataset) -> Iterator[str]:
    report = dataset.path / REPORT
    if not report.is_file() or sha256_of(report) != dataset.manifest.report_sha256:
        yield f"{report}: missing or changed"


def _check_tokenizer(dataset: Dataset) -> Iterator[str]:
    tokenizer, info = dataset.tokenizer(), dataset.manifest.tokenizer
    if (tokenizer.vocab_size, tokenizer.eod_id) != (info.vocab_size, info.eod_id):
        yield f"{dataset.path / info.file}: its vocabulary or end-of-document id is not the manifest's"


def _check_shard(dataset: Dataset, split: Split, number: int, info: ShardInfo, rows: list[Row]) -> list[str]:
    path = dataset.path / info.path
    findings = []
    try:
        reader = dataset.open_shard(split, 0, number)
        for row in rows:
            batch = read_batch(reader, row["batch"], path)
            where = f"{path}: record batch {row['batch']} (tokens from {row['tok0']:,} of {split})"
            findings += [f"{where} {problem}" for problem in _check_batch(batch, row, dataset)]
    except UserError as error:
        findings.append(str(error))
    if sum(row["n_rows"] for row in rows) != info.documents or sum(row["n_tokens"] for row in rows) != info.tokens:
        findings.append(f"{path}: the index and the manifest disagree on its documents or tokens")
    if not findings and sha256_of(path) != info.sha256:
        findings.append(f"{path}: its bytes changed, outside the documents")
    return findings


def _check_batch(batch: pa.RecordBatch, row: Row, dataset: Dataset) -> Iterator[str]:
    if batch_xxh3(batch) != row["xxh3"]:
        yield "has changed"
        return
    tokens = batch["tokens"].values.to_numpy()
    ends = batch["tokens"].offsets.to_numpy()[1:]
    if (len(batch), len(tokens)) != (row["n_rows"], row["n_tokens"]):
        yield "is not as long as the index says"
    elif tokens.max() >= dataset.vocab_size:
        yield f"holds the id {tokens.max()}, beyond the vocabulary of {dataset.vocab_size}"
    elif not np.array_equal(np.flatnonzero(tokens == dataset.eod_id) + 1, ends):
        yield "holds a document that does not end in, or is interrupted by, the end-of-document id"
