"""Units of documents to parts: temporary Arrow files of token ids, one record batch per split.

Rows are sorted by a key that decides where in the split a document ends up: a keyed hash of its content and its
position, so the order is a shuffle that neither workers nor scheduling can change.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_tools.config import BuildConfig
from data_tools.read import Document, Skipped, Unit, read_unit
from data_tools.shard_writer import Row, document_columns, narrow
from data_tools.tokenizer_training import keyed_hash
from megagpt.data_manifest import SPLITS, Split
from megagpt.files import make_durable
from megagpt.shards import HASH_BYTES, document_schema, token_dtype
from megagpt.tokenizer import Tokenizer

PIECE = 2**20  # characters, so at most 4 MiB of UTF-8, go to the encoder at once
PART_TOKENS = 2**25  # a part is written when this many are in memory


@dataclass
class Count:
    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    tokens: int = 0

    def add(self, other: "Count") -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.tokens += other.tokens


@dataclass
class Tally:
    """What came out of one unit: small enough to travel."""

    parts: list[str] = field(default_factory=list)  # file names
    counts: dict[tuple[int, Split], Count] = field(default_factory=lambda: defaultdict(Count))  # by source
    skipped: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by reason
    first_skipped: dict[str, str] = field(default_factory=dict)  # where
    input_sha256: str = ""  # of the documents' hashes, in order

    def add(self, other: "Tally") -> None:
        self.parts += other.parts
        for key, count in other.counts.items():
            self.counts[key].add(count)
        for reason, n in other.skipped.items():
            self.skipped[reason] += n
            self.first_skipped.setdefault(reason, other.first_skipped[reason])

    def total(self, *, source: int | None = None, split: Split | None = None) -> Count:
        total = Count()
        for (from_source, to_split), count in self.counts.items():
            if source in (None, from_source) and split in (None, to_split):
                total.add(count)
        return total


class KeyedRow(NamedTuple):
    key: int
    row: Row


def tokenize_unit(unit: Unit, number: int, folder: Path, model: Path, model_sha256: str, config: BuildConfig) -> Tally:
    """Write the unit's documents as one part, or as several where it holds more than PART_TOKENS."""
    tokenizer = _load_tokenizer(model, model_sha256)
    tally = Tally()
    digest = hashlib.sha256()
    rows: dict[Split, list[KeyedRow]] = {split: [] for split in SPLITS}
    buffered = 0
    for group in _groups(read_unit(unit, config), tally):
        for document, tokens in zip(group, _encode(tokenizer, group), strict=True):
            text = document.text.encode()
            doc = hashlib.blake2b(text, digest_size=HASH_BYTES).digest()
            key = keyed_hash(doc + document.position.encode(), config.seed)
            split = split_of(doc, config)
            rows[split].append(KeyedRow(key, Row(tokens, doc, document.source)))
            tally.counts[document.source, split].add(Count(1, len(text), len(tokens)))
            digest.update(doc)
            buffered += len(tokens)
        if buffered >= PART_TOKENS:
            tally.parts.append(_write_part(rows, folder, f"part-{number:06d}-{len(tally.parts):03d}", tokenizer))
            buffered = 0
    if buffered:
        tally.parts.append(_write_part(rows, folder, f"part-{number:06d}-{len(tally.parts):03d}", tokenizer))
    tally.input_sha256 = digest.hexdigest()
    return tally


def split_of(doc: bytes, config: BuildConfig) -> Split:
    """By content alone, so that equal documents never straddle two splits."""
    at = keyed_hash(doc, config.seed) / 2**64
    if at < config.test_fraction:
        return "test"
    return "val" if at < config.test_fraction + config.val_fraction else "train"


def cut(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, each cut after the last white space that fits, if there is any."""
    pieces = []
    start = 0
    while len(text) - start > most:
        end = 1 + max(text.rfind(space, start, start + most) for space in " \n\t")
        end = end if end > start else start + most
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


@lru_cache(maxsize=1)
def _load_tokenizer(model: Path, sha256: str) -> Tokenizer:
    return Tokenizer.load(model, sha256=sha256)  # the hash is in the key: a worker may outlive a build


def _groups(items: Iterator[Document | Skipped], tally: Tally) -> Iterator[list[Document]]:
    """Documents by the million characters, because an encoder call costs as much as a short document."""
    group: list[Document] = []
    size = 0
    for item in items:
        if isinstance(item, Skipped):
            if item.reason not in tally.skipped:
                tally.first_skipped[item.reason] = item.where()
            tally.skipped[item.reason] += 1
            continue
        group.append(item)
        size += len(item.text)
        if size >= PIECE:
            yield group
            group, size = [], 0
    yield group


def _encode(tokenizer: Tokenizer, group: Sequence[Document]) -> Iterator[np.ndarray]:
    """Each document's ids in the shards' type, the end-of-document id last."""
    pieces = [cut(document.text, PIECE) for document in group]
    encoded = iter(tokenizer.encode_batch([piece for cuts in pieces for piece in cuts]))
    eod = np.array([tokenizer.eod_id])
    for cuts in pieces:
        ids = [next(encoded) for _ in cuts]
        yield narrow(np.concatenate([*ids, eod]), tokenizer.vocab_size)


def _write_part(rows: dict[Split, list[KeyedRow]], folder: Path, name: str, tokenizer: Tokenizer) -> str:
    """Sorted by key, and emptied for the next part."""
    dtype = token_dtype(tokenizer.vocab_size)
    schema = document_schema(dtype).append(pa.field("key", pa.uint64()))
    temporary = folder / f"{name}.tmp"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for split in SPLITS:
            ordered = sorted(rows[split], key=lambda row: row.key)
            columns = document_columns([row.row for row in ordered], dtype)
            keys = pa.array([row.key for row in ordered], pa.uint64())
            writer.write_batch(pa.record_batch([*columns, keys], schema=schema))
            rows[split].clear()
    make_durable(temporary, folder / f"{name}.arrow")
    return f"{name}.arrow"
