"""Tokens for benchmarks: no text, but a vocabulary as large as wanted and a distribution that a model can learn."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_support import small_tokenizer, write_dataset

from megagpt.tokenizer.tokenizer import Tokenizer

LETTERS = str.maketrans("0123456789", "auchfmslod")


@cache
def wide_tokenizer(vocab_size: int) -> Tokenizer:
    """The small tokenizer with pieces added that no text contains, of letters that it has."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(small_tokenizer().model_bytes)
    for i in range(len(model.pieces), vocab_size):
        model.pieces.add(piece="tt" + f"{i:06}".translate(LETTERS), score=-20.0)
    model.trainer_spec.vocab_size = len(model.pieces)
    return Tokenizer(model.SerializeToString())


def zipf_ids(rng: np.random.Generator, n: int, vocab_size: int) -> np.ndarray:
    """n ids of no control token, each drawn with probability 1 / rank."""
    weights = 1.0 / np.arange(1, vocab_size - 2)
    edges = np.cumsum(weights / weights.sum())
    return (3 + np.searchsorted(edges[:-1], rng.random(n))).astype(np.uint16)


def write_zipf(folder: Path, n_tokens: int, vocab_size: int, *, n_shards: int = 1, seed: int = 0) -> None:
    """folder/train and folder/val, in documents of about 2^12 tokens."""
    tokenizer = wide_tokenizer(vocab_size)
    for split, n in (("train", n_tokens), ("val", 4096)):
        ids = zipf_ids(np.random.default_rng([seed, len(split)]), n, tokenizer.vocab_size)
        documents = np.array_split(ids, max(1, n >> 12))
        for document in documents:
            document[-1] = tokenizer.eod_id
        write_dataset(
            folder / split,
            documents,
            split=split,
            n_shards=n_shards if split == "train" else 1,
            batch_tokens=2**20,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
        )
