"""Find duplicates and near-duplicates in a corpus of any size, by locality-sensitive hashing (LSH): the algorithm.

The tasks that call it are in stages/deduplicate.py. A document has the order number unit * 2^32 + row. Each function
is the body of one task: it reads files and writes files.

    write_bands   for each unit: the keys of its documents in each band
    link          for each band and range of keys: which documents share a key
    cluster       once: documents linked directly or indirectly are one cluster, represented by its first document
    duplicates_in for each unit: its documents that are not the first of their cluster

Near-duplicates share a key if they agree in all `rows` values of any of `bands` bands of their MinHash signatures. Two
documents of Jaccard similarity s do so with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", section 3.4): with 14 bands of 8 rows, 5 % at s = 0.5, 92 % at 0.8, 99.96 % at 0.9.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from data_tools.dedup.minhash import DIGEST_BYTES, MinHash, TextDigest
from data_tools.storage.arrow_columns import new_arrow_file, to_arrow, to_numpy
from megagpt.config.parsing import Strict

EXACT = 0  # the band of the text digests; the bands of the signatures follow
ROW_BITS = 32
# A key is 128 bits, `key` and `low`: with 64, some two of 10^10 different documents would share one by chance.
BANDS = pa.schema([("key", pa.uint64()), ("low", pa.uint64()), ("row", pa.uint32())])
LINKS = pa.schema([("first", pa.uint64()), ("other", pa.uint64())])
CLUSTERS = pa.schema([("document", pa.uint64()), ("first", pa.uint64()), ("exact", pa.bool_())])


class DedupConfig(Strict):
    method: Literal["none", "exact", "near"] = Field(
        default="exact", description="exact: equal up to white space and Unicode form; near: also by MinHash"
    )
    duplicates: Literal["remove", "keep"] = Field(
        default="remove", description="keep: drop nothing, but put all copies of a document in one split"
    )
    bands: int = Field(
        default=14, gt=0, le=256, description="of a signature; more bands find more documents, and less similar ones"
    )
    rows: int = Field(default=8, gt=0, le=64, description="values in a band; more find only more similar documents")
    ngram: int = Field(
        default=5, gt=0, le=10_000, description="words in an n-gram; similarity is that of the sets of n-grams"
    )

    @model_validator(mode="after")
    def _signatures_are_for_near(self) -> "DedupConfig":
        if self.method != "near" and (idle := {"bands", "rows", "ngram"} & self.model_fields_set):
            raise ValueError(
                f"dedup.{sorted(idle)[0]} has no effect with dedup.method={self.method!r}; set dedup.method to near"
            )
        return self

    @property
    def n_bands(self) -> int:
        """The number of bands to link: the exact one and those of the signatures."""
        return {"none": 0, "exact": 1, "near": 1 + self.bands}[self.method]


class Duplicates(NamedTuple):
    """The documents of a unit that are not the first of their cluster."""

    rows: np.ndarray  # uint32, sorted
    firsts: np.ndarray  # uint64: the order number of the cluster's first document
    exact: np.ndarray  # bool: linked to the first by equal digests alone; otherwise near


def write_bands(pieces: Iterable[tuple[int, str]], n_documents: int, out: Path, cfg: DedupConfig, *, seed: int) -> None:
    """Write the keys of a unit's documents, one record batch per band, sorted by key and then row.

    Batch 0 is the exact band; with method near, batches 1 to cfg.bands are those of the signatures, from which
    documents without words are absent. `pieces` are (row, text) with row < n_documents, the pieces of a document one
    after the other; rows may be missing. Memory: 16 bytes per document and band.
    """
    size = cfg.n_bands * DIGEST_BYTES
    keys = bytearray(n_documents * size)
    n_keys = np.zeros(n_documents, np.int32)
    for row, group in groupby(pieces, key=itemgetter(0)):
        digest = TextDigest()
        signature = MinHash(cfg.bands * cfg.rows, cfg.ngram, seed) if cfg.method == "near" else None
        for _, text in group:
            digest.update(text)
            if signature:
                signature.update(text)
        found = digest.digest() + (signature.band_keys(cfg.bands) if signature else b"")
        keys[row * size : row * size + len(found)] = found
        n_keys[row] = len(found) // DIGEST_BYTES
    halves = np.frombuffer(keys, ">u8").reshape(n_documents, cfg.n_bands, 2)
    _write(out, BANDS, (_sorted_band(halves[:, band], n_keys > band) for band in range(cfg.n_bands)))


def _sorted_band(keys: np.ndarray, present: np.ndarray) -> list[np.ndarray]:
    """Return the columns of BANDS from keys of shape (documents, 2), for the documents that are present."""
    rows = np.flatnonzero(present)
    key, low = keys[rows].astype(np.uint64).T
    order = np.lexsort((low, key))  # stable, so rows rise among equal keys
    return [key[order], low[order], rows[order].astype(np.uint32)]


def link(files: Sequence[Path], band: int, key_range: int, n_ranges: int, out: Path) -> int:
    """Link the documents that share a key of this band to the first of them; returns the number of links.

    files[i] is what write_bands wrote for unit i. Only keys in range `key_range` of n_ranges equal ones are read, at
    about 80 bytes per document. The links (first, other) are sorted.
    """
    low_key = 2**64 * key_range // n_ranges
    high_key = 2**64 * (key_range + 1) // n_ranges - 1
    nothing = (np.empty(0, np.uint64),) * 3
    read = [nothing, *(_keys_between(low_key, high_key, path, band, unit) for unit, path in enumerate(files))]
    key, low, document = (np.concatenate(columns) for columns in zip(*read, strict=True))
    order = np.lexsort((low, key))  # stable, so documents rise among equal keys
    key, low, document = key[order], low[order], document[order]
    # where a new key starts; every later document with the same key is linked to the one at its start
    starts = np.ones(len(key), bool)
    starts[1:] = (key[1:] != key[:-1]) | (low[1:] != low[:-1])
    first = document[np.maximum.accumulate(np.where(starts, np.arange(len(key)), 0))]
    links = np.stack([first[~starts], document[~starts]])
    links = links[:, np.lexsort(links[::-1])]
    _write(out, LINKS.with_metadata({"band": str(band)}), [list(links)])
    return links.shape[1]


def _keys_between(low: int, high: int, path: Path, band: int, unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the columns (key, low, document) of a band with low <= key <= high, copied so that no file stays open."""
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(band)
        keys = to_numpy(batch["key"])
        begin = int(np.searchsorted(keys, np.uint64(low), side="left"))
        end = int(np.searchsorted(keys, np.uint64(high), side="right"))
        rows = to_numpy(batch["row"])[begin:end]
        return keys[begin:end].copy(), to_numpy(batch["low"])[begin:end].copy(), rows + order_number(unit, 0)


def order_number(unit: int, row: int) -> np.uint64:
    """Return a document's number in the whole input."""
    return np.uint64((unit << ROW_BITS) + row)


def cluster(files: Sequence[Path], out: Path) -> dict[str, int]:
    """Join all links into clusters (connected components); returns the number of clusters, exact and near duplicates.

    Writes (document, first, exact), sorted by document, for every document that is not the first of its cluster.
    Memory: about 200 bytes for each of these, however many links it has, and 100 per link of the largest file.
    """
    firsts, documents = _components(files)
    exact_firsts, exact_documents = _components([path for path in files if _band(path) == EXACT])
    # exact: the links of the exact band alone lead to the same first document
    exact = np.zeros(len(documents), bool)
    at = np.searchsorted(documents, exact_documents)
    exact[at] = exact_firsts == firsts[at]
    _write(out, CLUSTERS, [[documents, firsts, exact]])
    n_exact = int(np.sum(exact))
    return {"clusters": len(_distinct(firsts)), "exact": n_exact, "near": len(documents) - n_exact}


def _components(files: Sequence[Path]) -> np.ndarray:
    """Return (first, document) of every document that is not the first of its component, sorted. (2, documents) uint64.

    Near-duplicates share many bands, so there are many more links than documents. To keep memory proportional to
    documents, the components known so far are kept as one link per document, and further links are joined to them
    whenever there are as many.
    """
    known = np.empty((2, 0), np.uint64)
    waiting: list[np.ndarray] = []
    for path in files:
        waiting.append(_read_links(path))
        if sum(links.shape[1] for links in waiting) >= known.shape[1]:
            known, waiting = _join(np.concatenate([known, *waiting], axis=1)), []
    return _join(np.concatenate([known, *waiting], axis=1))


def _join(links: np.ndarray) -> np.ndarray:
    """Return the same as `_components`, for links in memory."""
    if not links.shape[1]:
        return links
    # imported here: it takes long, and most processes of a build do not need it
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    documents = _distinct(links)
    ends = np.searchsorted(documents, links).astype(np.int32)
    ones = np.ones(links.shape[1], bool)
    graph = coo_array((ones, (ends[0], ends[1])), shape=(len(documents), len(documents)))
    _, labels = connected_components(graph, directed=False)
    _, first_nodes = np.unique(labels, return_index=True)
    firsts = documents[first_nodes[labels]]
    is_later = documents != firsts
    return np.stack([firsts[is_later], documents[is_later]])


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return the different values, sorted.

    For millions of numbers, np.unique takes twenty times as long: it hashes them.
    """
    values = np.sort(values, axis=None)
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new]


def _band(links: Path) -> int:
    """Return the band that a file of links is of."""
    with pa.memory_map(str(links)) as file:
        return int(pa.ipc.open_file(file).schema.metadata[b"band"])


def _read_links(path: Path) -> np.ndarray:
    """Return (first, other) of each link. (2, links) uint64."""
    with pa.memory_map(str(path)) as file:
        return np.stack([to_numpy(values) for values in pa.ipc.open_file(file).get_batch(0).columns])


def duplicates_in(unit: int, clusters: Path) -> Duplicates:
    """Return the documents of a unit that are not the first of their cluster.

    Any other document is the first of its cluster, or has no copies.
    """
    with pa.memory_map(str(clusters)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
        documents = to_numpy(batch["document"])
        begin, end = np.searchsorted(documents, [order_number(unit, 0), order_number(unit + 1, 0)])
        batch = batch.slice(begin, end - begin)
        return Duplicates(
            rows=(documents[begin:end] - order_number(unit, 0)).astype(np.uint32),
            firsts=to_numpy(batch["first"]).copy(),
            exact=to_numpy(batch["exact"]),
        )


def clustered_rows(unit: int, clusters: Path) -> set[int]:
    """Return the rows of a unit's documents that have copies anywhere."""
    with pa.memory_map(str(clusters)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
        documents = np.concatenate([to_numpy(batch["document"]), to_numpy(batch["first"])])
        own = documents[(documents >= order_number(unit, 0)) & (documents < order_number(unit + 1, 0))]
        return set((own - order_number(unit, 0)).tolist())


def _write(path: Path, schema: pa.Schema, batches: Iterable[Sequence[np.ndarray]]) -> None:
    with new_arrow_file(path, schema) as writer:
        for columns in batches:
            writer.write_batch(pa.record_batch([to_arrow(values) for values in columns], schema=schema))
