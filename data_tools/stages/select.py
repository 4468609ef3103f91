"""Decide which documents of a unit stay, and in which split: the one given with the input, or by a keyed hash."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from data_tools.dedup.lsh import Duplicates, duplicates_in
from data_tools.executor.tasks import file_of
from data_tools.storage.document_store import DocumentInfo, read_documents, read_pieces
from megagpt.config.parsing import Strict
from megagpt.data.manifest import Split

CLUSTERS, CONTAMINATED, PARTS = ".arrow", ".npy", ".parts.json"
GIVEN: tuple[Split | None, ...] = ("test", "val", "train", None)  # the order of units by the split that is given


class SplitConfig(Strict):
    """The fractions of the splits, what to do with duplicates, and the seed of the hash that splits."""

    val_fraction: float
    test_fraction: float
    duplicates: Literal["remove", "keep"]
    seed: int
    given: tuple[int, int, int] = Field(default=(0, 0, 0), exclude_if=lambda value: not any(value))
    """The units at which those given as test end, then val, then train; the fractions apply to all others."""

    def given_split(self, unit: int) -> Split | None:
        """Return the split that was given with a unit's input."""
        return GIVEN[bisect_right(self.given, unit)]

    def trains(self, n_units: int) -> bool:
        """Tell whether anything is for training, rather than all held out."""
        _, val, train = self.given
        return train > val or (n_units > train and self.shares["train"] > 0)

    @property
    def shares(self) -> dict[Split, float]:
        """Return the share of each split in the documents that no input assigns."""
        train = 1 - (self.val_fraction + self.test_fraction)  # 0.0 for 0.7 and 0.3
        return {"train": max(0.0, train), "val": self.val_fraction, "test": self.test_fraction}


class UnitInput(Strict):
    """A unit's number and source, and the files that earlier stages wrote for it, relative to the scratch folder."""

    number: int
    source: int
    files: tuple[int, ...]  # for each slice, the number of its file in the source
    texts: str  # prefix of the documents
    contamination: str | None  # prefix of the contaminated rows
    parts: str | None = Field(default=None, exclude_if=lambda value: value is None)  # prefix of the documents to cut

    def paths(self, scratch: Path) -> tuple[Path, Path | None, Path | None]:
        """Return the three prefixes as paths."""
        return (
            scratch / self.texts,
            scratch / self.contamination if self.contamination else None,
            scratch / self.parts if self.parts else None,
        )


class Part(Strict):
    """A part of a document that is cut (stages/cut_documents.py), which is a document of its own from here on."""

    split: Split
    end: int  # bytes from the start of the whole document
    bytes: int
    doc: str  # content hash, in hexadecimal


@dataclass(frozen=True)
class Selection:
    """The documents of a unit, their splits, and those that are dropped."""

    documents: list[DocumentInfo]  # of the unit, and then the parts of those that are cut
    splits: list[Split]
    dropped: dict[int, str]  # row -> why
    ends: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # row of a cut document -> (row, end) of parts

    def pieces(self, texts: Path) -> Iterator[tuple[int, str]]:
        """Yield (row, piece) of all documents in order; those that are cut have the rows of their parts."""
        for row, group in groupby(read_pieces(texts), key=itemgetter(0)):
            if row not in self.ends:
                yield from group
                continue
            rows, ends = zip(*self.ends[row], strict=True)
            for part, text in cut_pieces((text for _, text in group), ends):
                yield rows[part], text


def select(unit: UnitInput, scratch: Path, clusters: Path | None, config: SplitConfig) -> Selection:
    """Select from a unit's documents. `clusters` is the prefix of an earlier task, or None if there was none."""
    texts, contamination, parts = unit.paths(scratch)
    documents = read_documents(texts)
    dropped = {row: "cannot be read to its end" for row, document in enumerate(documents) if not document.kept}
    dropped |= dict.fromkeys(sorted(contaminated_rows(contamination)), "contaminated")
    given = config.given_split(unit.number)
    splits = [given or split_of(document.doc, config) for document in documents]
    if clusters is not None:
        copies = duplicates_in(unit.number, file_of(clusters, CLUSTERS))
        if config.duplicates == "keep":
            _keep_copies_together(unit.number, copies, splits, dropped, config)
        else:
            for row, is_exact in zip(copies.rows.tolist(), copies.exact.tolist(), strict=True):
                dropped.setdefault(row, "exact duplicate" if is_exact else "near duplicate")
    selection = Selection(documents, splits, dropped)
    if parts is not None:
        _add_parts(selection, parts)
    return selection


def _keep_copies_together(
    unit: int, copies: Duplicates, splits: list[Split], dropped: dict[int, str], config: SplitConfig
) -> None:
    """Put each document into the split of its cluster's first one, so that copies end up in one split.

    Units come in the order of GIVEN, so the first is one of a given split if the cluster has any. Copies of held-out
    documents stay only where they are given as the same split.
    """
    given = config.given_split(unit)
    firsts = np.arange(len(splits), dtype=np.uint64) + np.uint64(unit << 32)
    firsts[copies.rows] = copies.firsts
    for row, first in enumerate(firsts.tolist()):
        of_first = config.given_split(first >> 32)
        splits[row] = of_first or split_of(first.to_bytes(8, "big"), config)
        if of_first in ("val", "test") and of_first != given:
            dropped.setdefault(row, "copy of a held-out document")


def _add_parts(selection: Selection, prefix: Path) -> None:
    """Add the parts of the documents that are cut as documents."""
    for key, parts in json.loads(file_of(prefix, PARTS).read_bytes()).items():
        whole = selection.documents[int(key)]
        for part in map(Part.model_validate, parts):
            selection.ends.setdefault(int(key), []).append((len(selection.documents), part.end))
            selection.documents.append(whole._replace(doc=bytes.fromhex(part.doc), bytes=part.bytes))
            selection.splits.append(part.split)


def cut_pieces(pieces: Iterable[str], ends: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield (number of the part, piece) of a document that is cut at the `ends`, in bytes; the last is its size."""
    part, at = 0, 0
    for text in pieces:
        data = text.encode()
        start = 0
        while start < len(data):
            stop = min(len(data), ends[part] - at)
            yield part, data[start:stop].decode()
            part += at + stop == ends[part]
            start = stop
        at += len(data)


def split_of(key: bytes, config: SplitConfig) -> Split:
    """Return the split of a key: a document's content hash or its cluster, so that equal documents are in one split."""
    at = keyed_hash(key, config.seed) / 2**64
    if at < config.test_fraction:
        return "test"
    return "val" if at < config.test_fraction + config.val_fraction else "train"


def keyed_hash(data: bytes, seed: int) -> int:
    """Return 64 pseudo-random bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")


def selected_texts(texts: Path, selection: Selection) -> Iterator[tuple[int, str]]:
    """Yield (row, piece) of the documents that stay."""
    return ((row, text) for row, text in selection.pieces(texts) if row not in selection.dropped)


def contaminated_rows(contamination: Path | None) -> set[int]:
    """Return the rows of a unit's contaminated documents."""
    return set() if contamination is None else set(np.load(file_of(contamination, CONTAMINATED)).tolist())
