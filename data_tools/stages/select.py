"""Decide which documents of a unit stay (neither duplicate nor contaminated), and in which split, by a keyed hash."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_tools.dedup.lsh import duplicates_in
from data_tools.executor.tasks import file_of
from data_tools.storage.document_store import DocumentInfo, read_documents, read_pieces
from megagpt.config.parsing import Strict
from megagpt.data.manifest import Split

CLUSTERS, CONTAMINATED = ".arrow", ".npy"


class SplitConfig(Strict):
    """The fractions of the splits, what to do with duplicates, and the seed of the hash that splits."""

    val_fraction: float
    test_fraction: float
    duplicates: Literal["remove", "keep"]
    seed: int


class UnitInput(Strict):
    """A unit's number and source, and the files that earlier stages wrote for it, relative to the scratch folder."""

    number: int
    source: int
    files: tuple[int, ...]  # for each slice, the number of its file in the source
    texts: str  # prefix of the documents
    contamination: str | None  # prefix of the contaminated rows

    def paths(self, scratch: Path) -> tuple[Path, Path | None]:
        """Return the two prefixes as paths."""
        return scratch / self.texts, scratch / self.contamination if self.contamination else None


@dataclass(frozen=True)
class Selection:
    """The documents of a unit, their splits, and those that are dropped."""

    documents: list[DocumentInfo]
    splits: list[Split]
    dropped: dict[int, str]  # row -> why


def select(texts: Path, unit: int, clusters: Path | None, contamination: Path | None, config: SplitConfig) -> Selection:
    """Select from a unit's documents. The paths are prefixes of earlier tasks, or None if there was no such stage."""
    documents = read_documents(texts)
    dropped = {row: "cannot be read to its end" for row, document in enumerate(documents) if not document.kept}
    dropped |= dict.fromkeys(sorted(contaminated_rows(contamination)), "contaminated")
    split_keys = [document.doc for document in documents]
    if clusters is not None:
        copies = duplicates_in(unit, file_of(clusters, CLUSTERS))
        if config.duplicates == "keep":
            # each document is split by its cluster's first document, so that copies end up in one split
            order = np.arange(len(documents), dtype=np.uint64) + np.uint64(unit << 32)
            order[copies.rows] = copies.firsts
            split_keys = [int(number).to_bytes(8, "big") for number in order]
        else:
            for row, is_exact in zip(copies.rows.tolist(), copies.exact.tolist(), strict=True):
                dropped.setdefault(row, "exact duplicate" if is_exact else "near duplicate")
    return Selection(documents, [split_of(key, config) for key in split_keys], dropped)


def split_of(key: bytes, config: SplitConfig) -> Split:
    """Return the split of a key: a document's content hash or its cluster, so that equal documents are in one split."""
    at = keyed_hash(key, config.seed) / 2**64
    if at < config.test_fraction:
        return "test"
    return "val" if at < config.test_fraction + config.val_fraction else "train"


def keyed_hash(data: bytes, seed: int) -> int:
    """64 pseudo-random bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")


def selected_texts(texts: Path, selection: Selection) -> Iterator[tuple[int, str]]:
    """Yield (row, piece) of the documents that stay."""
    return ((row, text) for row, text in read_pieces(texts) if row not in selection.dropped)


def contaminated_rows(contamination: Path | None) -> set[int]:
    """Return the rows of a unit's contaminated documents."""
    return set() if contamination is None else set(np.load(file_of(contamination, CONTAMINATED)).tolist())
