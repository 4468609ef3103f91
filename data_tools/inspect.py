"""The `inspect` command: show what a dataset contains, or the samples of a run, and where each text came from."""

import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from data_tools.formatting import format_bytes
from megagpt.checkpoint.run_samples import open_run
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.manifest import Split
from megagpt.data.provenance import origins
from megagpt.data.training_set import TrainingSet
from megagpt.terminal import counted


def inspect(folder: Path, *, split: Split = "train", documents: int = 0, as_json: bool = False) -> str:
    """Describe a dataset by its manifest, and show its first documents with their origins."""
    dataset = open_dataset(folder)
    texts = _texts(dataset, split, documents) if documents else []
    if as_json:
        content: dict[str, Any] = dataset.manifest.model_dump(mode="json")
        return json.dumps(content | {"documents": texts}, indent=1)
    blocks = [_describe(dataset)]
    wholes = (origin for origin in origins(dataset, split, count()) if origin.part == 0)
    for number, (text, origin) in enumerate(zip(texts, wholes, strict=False)):
        blocks.append(f"--- {split} document {number}, from {origin} ---\n{text}")
    return "\n".join(blocks)


def inspect_samples(run: Path, *, sample: int | None = None, step: int | None = None) -> str:
    """Show the text of one sample of a run, or of all samples of a step, trained on or not yet, and its origins."""
    data = open_run(run)
    samples = [sample] if sample is not None else data.mixture.samples_of(step or 1)
    return "\n".join(block for number in samples for block in _show_sample(data, number))


def _show_sample(data: TrainingSet, sample: int) -> Iterator[str]:
    for span in data.spans(sample):
        stream = span.dataset.stream("train", span.variant)
        yield (
            f"--- sample {sample}: {span.dataset.path}, variant {span.variant}, epoch {span.epoch}, "
            f"tokens {span.start:,} to {span.start + len(span.tokens) - 1:,} ---"
        )
        for origin in origins(span.dataset, "train", stream.rows_of(span.start, len(span.tokens))):
            yield f"from {origin}"
        yield span.dataset.tokenizer().decode(span.tokens)


def _texts(dataset: Dataset, split: Split, n: int) -> list[str]:
    stream, tokenizer = dataset.stream(split), dataset.tokenizer()
    return [tokenizer.decode(ids) for ids in islice(stream.documents(), n)]


def _describe(dataset: Dataset) -> str:
    manifest = dataset.manifest
    tokenizer = manifest.tokenizer
    lines = [
        f"{dataset.path}: {manifest.format} version {manifest.version}, built {manifest.created}",
        f"  fingerprint  {manifest.fingerprint[:16]}",
        f"  tokenizer    {tokenizer.type}, {tokenizer.vocab_size:,} pieces, end of document {tokenizer.eod_id}",
    ]
    for source in manifest.sources:
        lines.append(
            f"  source       {source.name}: {counted(source.files, 'file')}, {counted(source.documents, 'document')}, "
            f"{format_bytes(source.bytes)} of text"
        )
    for name, split in manifest.splits.items():
        shards = split.variants[0].shards
        lines.append(
            f"  {name:12} {counted(split.documents, 'document')}, {split.tokens:,} tokens as {manifest.dtype} in "
            f"{counted(len(shards), 'shard')} ({format_bytes(sum(shard.bytes for shard in shards))})"
        )
    return "\n".join(lines)
