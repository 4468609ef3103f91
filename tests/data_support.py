"""Small texts, tokenizers and datasets for the tests of the data side. Everything here is deterministic."""

import io
import os
import random
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from data_tools.__main__ import main
from data_tools.config import TokenizerConfig
from data_tools.stages.train_tokenizer import train_sample
from data_tools.storage.shard_writer import ShardRow, ShardWriter, write_index
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import SPLITS, Manifest, Split, SplitInfo, TokenizerInfo, Variant, write_manifest
from megagpt.data.shard_format import INDEX, TOKENIZER_MODEL, ShardHeader, token_dtype
from megagpt.tokenizer.tokenizer import Tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "models", "that", "learn", "to", "read", "def", "return", "self"]
VOCAB_SIZE = 300  # of the small tokenizers: 256 bytes, the special pieces, and a few of their own


def document(seed: int, n_words: int = 60) -> str:
    """Lines of words, some indented, some with a tab."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", "  ", "\n", "\n    ", "\t"]) for _ in range(n_words))


@contextmanager
def open_files_left(n: int) -> Iterator[None]:
    """This process may open n more files."""
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = next(number for number in count() if number - len([one for one in used if one < number]) == n)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def paragraphs(n: int, seed: int = 0) -> str:
    """One text of n paragraphs."""
    return "\n\n".join(document(seed + i, 40).strip() for i in range(n)) + "\n"


def write_text(path: Path, text: str) -> str:
    """Write a file, and its folder if needed; returns the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return text


def write_texts(folder: Path, n: int, n_words: int = 60) -> list[str]:
    """Write doc-000.txt, doc-001.txt, ...; returns their texts, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document(i, n_words) for i in range(n)]
    for i, text in enumerate(texts):
        (folder / f"doc-{i:03d}.txt").write_bytes(text.encode())
    return texts


@cache
def small_tokenizer(kind: Literal["unigram", "bpe", "char"] = "unigram") -> Tokenizer:
    sample = [document(i) for i in range(50)]
    return Tokenizer(train_sample(sample, TokenizerConfig(tokenizer_type=kind, vocab_size=VOCAB_SIZE)))


@cache
def lossy_tokenizer(kind: Literal["unigram", "bpe", "char", "word"] = "unigram") -> Tokenizer:
    """A tokenizer by SentencePiece's own defaults: it normalizes, and has no byte fallback but the letters of WORDS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for i in range(50) for line in document(i).splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def write_dataset(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    split: Split = "train",
    n_shards: int = 2,
    batch_tokens: int = 40,
    vocab_size: int = VOCAB_SIZE,
    build_id: str = "a" * 32,
    resampled: Sequence[Sequence[np.ndarray]] = (),
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Write a dataset of documents (ids that end in the end-of-document id 2), in small batches and several shards.

    Each of `resampled` is another tokenization of them, written as a variant.
    """
    tokenizer = tokenizer or small_tokenizer()
    folder.mkdir(parents=True)
    (folder / TOKENIZER_MODEL).write_bytes(tokenizer.model_bytes)
    variants, rows = [], []
    for number, tokenization in enumerate([documents, *resampled]):
        shards = []
        for shard, part in enumerate(np.array_split(np.arange(len(tokenization)), n_shards)):
            header = ShardHeader(
                build_id=build_id,
                split=split,
                variant=number,
                shard=shard,
                dtype=token_dtype(vocab_size),
                vocab_size=vocab_size,
                eod_id=tokenizer.eod_id,
                tokenizer_sha256=tokenizer.sha256,
            )
            path = folder / header.path
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = ShardWriter(path, header, batch_tokens=batch_tokens)
            for i in part:
                writer.add(ShardRow(tokenization[i], int(i).to_bytes(16, "big"), 0))
            info, index = writer.close()
            shards.append(info)
            rows += index
        n_tokens = sum(len(ids) for ids in tokenization)
        kind: Literal["canonical", "unigram-sampling"] = "unigram-sampling" if number else "canonical"
        variants.append(Variant(id=number, kind=kind, tokens=n_tokens, shards=tuple(shards)))
    manifest = Manifest(
        build_id=build_id,
        created="2026-01-01T00:00:00+00:00",
        tool="tests",
        tokenizer=TokenizerInfo(
            file=TOKENIZER_MODEL,
            sha256=tokenizer.sha256,
            type=tokenizer.kind,
            vocab_size=vocab_size,
            eod_id=tokenizer.eod_id,
            normalizer=tokenizer.normalizer,
            sample_sha256=None,
        ),
        dtype=token_dtype(vocab_size),
        splits={split: SplitInfo(documents=len(documents), bytes=variants[0].tokens, variants=tuple(variants))},
        index_sha256=write_index(folder / INDEX, rows),
        report_sha256="",
        other_files={},
        sources=(),
        input_sha256="",
        pipeline={},
    )
    return write_manifest(folder, manifest)


def documents_of(folder: Path) -> dict[Split, list[str]]:
    """The texts of each split, in order."""
    dataset = open_dataset(folder)
    tokenizer = dataset.tokenizer()
    texts: dict[Split, list[str]] = {}
    for split in SPLITS:
        if dataset.manifest.splits[split].documents:
            stream = dataset.stream(split)
            texts[split] = [tokenizer.decode(ids) for ids in stream.documents()]
    return texts


def all_documents(folder: Path) -> list[str]:
    return sorted(text for texts in documents_of(folder).values() for text in texts)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on when and how a dataset was built."""
    files = [path for path in folder.rglob("*") if path.suffix in (".arrow", ".model")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(*args: str | Path) -> int:
    return main([str(arg) for arg in args])
