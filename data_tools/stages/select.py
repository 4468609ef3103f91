"""Which documents stay and in which split: what duplicates and contamination decide, and then a keyed hash."""

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
    val_fraction: float
    test_fraction: float
    duplicates: Literal["remove", "keep"]
    seed: int


class UnitInput(Strict):
    """A unit's place among the units, and what earlier stages have made of it, as paths below the scratch folder."""

    number: int
    source: int
    files: tuple[int, ...]  # of each slice, counted within the source
    texts: str
    contamination: str | None

    def paths(self, scratch: Path) -> tuple[Path, Path | None]:
        """The prefixes of its texts and of its contaminated rows."""
        return scratch / self.texts, scratch / self.contamination if self.contamination else None


@dataclass(frozen=True)
class Selection:
    """Of one unit's documents."""

    documents: list[DocumentInfo]
    splits: list[Split]
    dropped: dict[int, str]  # row -> why


def select(texts: Path, unit: int, clusters: Path | None, contamination: Path | None, config: SplitConfig) -> Selection:
    """texts, clusters and contamination are the prefixes of earlier tasks; None where there was no such stage."""
    documents = read_documents(texts)
    dropped = {row: "cannot be read to its end" for row, document in enumerate(documents) if not document.kept}
    dropped |= dict.fromkeys(sorted(contaminated_rows(contamination)), "contaminated")
    split_keys = [document.doc for document in documents]
    if clusters is not None:
        copies = duplicates_in(unit, file_of(clusters, CLUSTERS))
        if config.duplicates == "keep":  # what is alike goes where the first of its cluster goes
            order = np.arange(len(documents), dtype=np.uint64) + np.uint64(unit << 32)
            order[copies.rows] = copies.firsts
            split_keys = [int(number).to_bytes(8, "big") for number in order]
        else:
            for row, is_exact in zip(copies.rows.tolist(), copies.exact.tolist(), strict=True):
                dropped.setdefault(row, "exact duplicate" if is_exact else "near duplicate")
    return Selection(documents, [split_of(key, config) for key in split_keys], dropped)


def split_of(key: bytes, config: SplitConfig) -> Split:
    """By content alone, or by cluster, so that equal documents never straddle two splits."""
    at = keyed_hash(key, config.seed) / 2**64
    if at < config.test_fraction:
        return "test"
    return "val" if at < config.test_fraction + config.val_fraction else "train"


def keyed_hash(data: bytes, seed: int) -> int:
    """64 bits that look random, and are the same everywhere."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")


def selected_texts(texts: Path, selection: Selection) -> Iterator[tuple[int, str]]:
    """(row, piece) of the documents that stay."""
    return ((row, text) for row, text in read_pieces(texts) if row not in selection.dropped)


def contaminated_rows(contamination: Path | None) -> set[int]:
    """The rows of a unit's contaminated documents."""
    return set() if contamination is None else set(np.load(file_of(contamination, CONTAMINATED)).tolist())
