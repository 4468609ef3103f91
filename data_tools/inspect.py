"""The `inspect` command: what a dataset holds, and its documents as text."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.report import human
from megagpt.data_manifest import Split
from megagpt.shards import Dataset, open_dataset


def inspect(folder: Path, *, split: Split = "train", documents: int = 0, as_json: bool = False) -> str:
    dataset = open_dataset(folder)
    texts = _texts(dataset, split, documents) if documents else []
    if as_json:
        content: dict[str, Any] = dataset.manifest.model_dump(mode="json")
        return json.dumps(content | {"documents": texts}, indent=1, ensure_ascii=False)
    blocks = [_describe(dataset)]
    for number, text in enumerate(texts):
        blocks.append(f"--- {split} document {number} ---\n{text}")
    return "\n".join(blocks)


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
            f"  source       {source.name}: {source.files:,} files, {source.documents:,} documents, "
            f"{human(source.bytes)} of text"
        )
    for name, split in manifest.splits.items():
        shards = split.variants[0].shards
        lines.append(
            f"  {name:12} {split.documents:,} documents, {split.tokens:,} tokens as {manifest.dtype} in "
            f"{len(shards)} shards ({human(sum(shard.bytes for shard in shards))})"
        )
    return "\n".join(lines)
