"""Tokenize the documents of a unit into token files: temporary Arrow files, one record batch per split.

A row is a piece of a document. Rows are sorted by a key that decides where in the split a document ends up: a keyed
hash of its content and its place in the input. So the order is a shuffle that does not depend on workers or scheduling.
stages/shuffle.py merges the token files into shards.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.executor.tasks import file_of
from data_tools.readers.document_pieces import PIECE_CHARACTERS
from data_tools.stages.select import Selection, SplitConfig, UnitInput, keyed_hash, select
from data_tools.stages.subword_sampling import SubwordSampler
from data_tools.storage.arrow_columns import new_arrow_file
from data_tools.storage.rejects import REJECTS, RejectWriter, open_rejects
from data_tools.storage.shard_writer import ShardRow, narrow
from data_tools.storage.token_files import KeyedRow, token_batch, token_file_schema
from megagpt.config.parsing import Strict
from megagpt.data.manifest import SPLITS, Split
from megagpt.tokenizer.tokenizer import Tokenizer

FILE_TOKENS = 2**25  # a token file is written when this many tokens are in memory


class VariantConfig(Strict):
    """One tokenization of the corpus: number 0 is the canonical one, the others are sampled (Kudo 2018)."""

    number: int = 0
    alpha: float = 0.0
    seed: int = 0


def tokenize(
    prefix: Path,
    unit: UnitInput,
    clusters: Path | None,
    model: Path,
    model_sha256: str,
    variant: VariantConfig,
    splits: SplitConfig,
) -> dict[str, Any]:
    """Run as a task: write the tokens of a unit's documents, in one file or one for every FILE_TOKENS.

    Variants other than the canonical one contain the training split only.
    """
    tokenizer = _load_tokenizer(model, model_sha256)
    scratch = prefix.parents[1]
    selection = select(unit, scratch, clusters, splits)
    sampler = _load_sampler(tokenizer, variant) if variant.number else None
    files = _TokenFiles(prefix, tokenizer)
    with open_rejects(file_of(prefix, REJECTS)) as rejects:
        pieces = _selected(scratch / unit.texts, selection, rejects if variant.number == 0 else None)
        if variant.number:
            pieces = ((row, text) for row, text in pieces if selection.splits[row] == "train")
        for group in _groups(pieces):
            ids = _encode(tokenizer, group, sampler)
            for (row, text, is_last), tokens in zip(group, ids, strict=True):
                files.add(row, text, tokens, is_last, selection, unit, splits.seed)
        files.flush()
        return {
            "parts": files.names,
            "counts": files.counts,
            "dropped": rejects.documents,
            "tokens_per_document": dict(files.lengths),
        }


def _selected(texts: Path, selection: Selection, rejects: RejectWriter | None) -> Iterator[tuple[int, str]]:
    """Yield (row, piece) of the documents that stay; write the others to the rejects."""
    documents = selection.documents
    for row, group in groupby(selection.pieces(texts), key=itemgetter(0)):
        if row not in selection.dropped:
            yield from group
        elif rejects is not None:
            rule = selection.dropped[row]
            rejects.count(rule, 1, documents[row].bytes)
            for _, text in group:
                rejects.write(rule, text, doc=documents[row].doc.hex(), position=documents[row].position)


def _groups(pieces: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str, bool]]]:
    """Group (row, piece, is it its document's last) by a million characters: each encoder call has a fixed cost."""
    group: list[tuple[int, str, bool]] = []
    size, previous = 0, next(pieces, None)
    while previous is not None:
        following = next(pieces, None)
        row, text = previous
        group.append((row, text, following is None or following[0] != row))
        size += len(text)
        if size >= PIECE_CHARACTERS:
            yield group
            group, size = [], 0
        previous = following
    if group:
        yield group


def _encode(
    tokenizer: Tokenizer, group: Sequence[tuple[int, str, bool]], sampler: SubwordSampler | None
) -> list[np.ndarray]:
    """Encode each piece to ids in the shards' type; a document's last piece ends in the end-of-document id."""
    if sampler is None:
        encoded = tokenizer.encode_batch([text for _, text, _ in group])
    else:
        encoded = [sampler.encode(text, text.encode()) for _, text, _ in group]
    eod, nothing = np.array([tokenizer.eod_id], np.int32), np.empty(0, np.int32)
    ends = [eod if is_last else nothing for _, _, is_last in group]
    flat = narrow(
        np.concatenate([ids for pair in zip(encoded, ends, strict=True) for ids in pair]), tokenizer.vocab_size
    )
    lengths = [len(ids) + len(end) for ids, end in zip(encoded, ends, strict=True)]
    return np.split(flat, np.cumsum(lengths)[:-1])


@lru_cache(maxsize=1)
def _load_sampler(tokenizer: Tokenizer, variant: VariantConfig) -> SubwordSampler:
    return SubwordSampler(tokenizer, variant.alpha, keyed_hash(f"variant {variant.number}".encode(), variant.seed))


@lru_cache(maxsize=1)
def _load_tokenizer(model: Path, sha256: str) -> Tokenizer:
    # the hash is part of the cache's key: a worker may serve several builds, with other models at the same path
    return Tokenizer.load(model, sha256=sha256)


class _TokenFiles:
    """Buffers rows of tokens and writes them to files, sorted."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self._prefix, self._tokenizer = prefix, tokenizer
        self._rows: dict[Split, list[KeyedRow]] = {split: [] for split in SPLITS}
        self._buffered = 0
        self._part = self._tokens = 0  # of the document being added: rows and tokens so far
        self._bytes = 0  # of its text since the last row
        self.names: list[str] = []
        self.counts: dict[Split, list[int]] = {split: [0, 0, 0] for split in SPLITS}  # documents, bytes, tokens
        self.lengths: Counter[int] = Counter()  # bit length of a document's tokens -> documents

    def add(
        self, row: int, text: str, ids: np.ndarray, is_last: bool, selection: Selection, unit: UnitInput, seed: int
    ) -> None:
        """Add the next piece of document `row`."""
        self._bytes += 0 if self._tokenizer.is_lossless else len(text.encode())
        if not len(ids):  # cleaning has removed all of it, or the tokenizer loses it
            return
        document, split = selection.documents[row], selection.splits[row]
        place = f"{unit.source}:{unit.files[document.slice]}:{document.position}".encode()
        key = keyed_hash(document.doc + place, seed)
        shard_row = ShardRow(ids, document.doc, unit.source, self._part, is_last)
        self._rows[split].append(KeyedRow(key, shard_row, document.slice, document.position, self._bytes))
        self._buffered += len(ids)
        self._part, self._tokens, self._bytes = self._part + 1, self._tokens + len(ids), 0
        counts = self.counts[split]
        counts[2] += len(ids)
        if is_last:
            counts[0] += 1
            counts[1] += document.bytes
            self.lengths[self._tokens.bit_length()] += 1
            self._part = self._tokens = 0
        if self._buffered >= FILE_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows as the next file, each split sorted by key."""
        if not self._buffered:
            return
        vocab_size = self._tokenizer.vocab_size
        path = file_of(self._prefix, f".{len(self.names):04d}.arrow")
        with_bytes = not self._tokenizer.is_lossless
        with new_arrow_file(path, token_file_schema(vocab_size, with_bytes=with_bytes)) as writer:
            for split in SPLITS:
                rows = sorted(self._rows[split], key=lambda row: row.key)
                writer.write_batch(token_batch(rows, vocab_size, with_bytes=with_bytes))
                self._rows[split].clear()
        self.names.append(path.name)
        self._buffered = 0
