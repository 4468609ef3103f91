"""Near-duplicates in megabytes per core-second, against datasketch on the same documents, and how many are found.

    python tests/benchmarks/near_dedup.py --megabytes 64

Both read JSON lines, take the same words in runs of five, sign with 112 hashes and meet in 14 bands of 8; datasketch
keeps its bands in memory, and ours writes files. It counts documents that meet an earlier one; ours all of a cluster
but the first. Time is the processor's, of this process and its children; the two take turns. Recall is over the first
documents, against the true similarity of all their pairs.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasketch
import numpy as np
import pyarrow as pa
from corpus import jsonl_corpus
from scipy.sparse import csr_array

from data_tools.dedup.lsh import DedupConfig, cluster, duplicates_in, link, write_bands
from data_tools.dedup.ngrams import ngram_hashes, word_hashes

CONFIG = DedupConfig(method="near")
UNIT_DOCUMENTS = 4096
WORD = re.compile(r"\w+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compared", type=int, default=4000, help="documents in the brute-force comparison")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        n = jsonl_corpus(corpus, args.megabytes * 10**6, seed=1234, near_duplicates=0.1)
        print(f"{n} documents, {corpus.stat().st_size / 1e6:.1f} MB of JSON lines, a tenth of them edited copies")
        compare_speed(corpus, folder, args.rounds)
        compare_with_brute_force(list(islice(texts_of(corpus), args.compared)), folder)


def texts_of(corpus: Path) -> Iterator[str]:
    with corpus.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


# --- speed ----------------------------------------------------------------------------------------------------


def compare_speed(corpus: Path, folder: Path, rounds: int) -> None:
    megabytes = corpus.stat().st_size / 1e6
    ratios = []
    print("round  megagpt MB/core-s  datasketch MB/core-s  ratio  duplicates: megagpt  datasketch")
    for number in range(rounds):
        ours, n_ours = core_seconds(lambda: with_files(corpus, folder))
        theirs, n_theirs = core_seconds(lambda: with_datasketch(corpus))
        ratios.append(theirs / ours)
        print(
            f"{number:5}  {megabytes / ours:17.1f}  {megabytes / theirs:20.2f}  {ratios[-1]:5.1f}"
            f"  {n_ours:19}  {n_theirs:10}"
        )
    print(f"median ratio {statistics.median(ratios):.1f}")


def core_seconds(work: Callable[[], int]) -> tuple[float, int]:
    begin = os.times()
    result = work()
    return sum(os.times()[:4]) - sum(begin[:4]), result


def with_files(corpus: Path, folder: Path) -> int:
    """The number of duplicates, after every stage of a build's near-deduplication."""
    texts = texts_of(corpus)
    bands: list[Path] = []
    while unit := list(islice(texts, UNIT_DOCUMENTS)):
        bands.append(folder / f"{len(bands)}.bands")
        write_bands(enumerate(unit), len(unit), bands[-1], CONFIG, seed=1)
    links = [folder / f"{band}.links" for band in range(CONFIG.n_bands)]
    for band, path in enumerate(links):
        link(bands, band, 0, 1, path)
    cluster(links, folder / "clusters")
    return sum(len(duplicates_in(unit, folder / "clusters").rows) for unit in range(len(bands)))


def with_datasketch(corpus: Path) -> int:
    """The number of documents that meet an earlier one."""
    lsh = datasketch.MinHashLSH(num_perm=CONFIG.bands * CONFIG.rows, params=(CONFIG.bands, CONFIG.rows))
    n_duplicates = 0
    for number, text in enumerate(texts_of(corpus)):
        words = WORD.findall(text.casefold())
        runs = [" ".join(words[i : i + CONFIG.ngram]).encode() for i in range(max(1, len(words) - CONFIG.ngram + 1))]
        sketch = datasketch.MinHash(CONFIG.bands * CONFIG.rows)
        sketch.update_batch(runs)
        n_duplicates += bool(lsh.query(sketch))
        lsh.insert(number, sketch)
    return n_duplicates


# --- recall ---------------------------------------------------------------------------------------------------


def compare_with_brute_force(texts: list[str], folder: Path) -> None:
    """Pairs of texts that meet in a band, by their true similarity; equal texts are left out."""
    first, second, similarity = similar_pairs(texts)
    write_bands(enumerate(texts), len(texts), folder / "compared", CONFIG, seed=1)
    keys = band_keys(folder / "compared", len(texts))
    met = np.any(np.all(keys[1:, first] == keys[1:, second], axis=2), axis=0)
    equal = np.all(keys[0, first] == keys[0, second], axis=1)
    n_pairs = len(texts) * (len(texts) - 1) // 2
    print(f"all {n_pairs} pairs of {len(texts)} documents; without the {np.sum(equal)} pairs of equal texts:")
    print("similarity    pairs  found   rate  by the formula")
    for low, high in ((0.3, 0.5), (0.5, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01), (0.8, 1.01)):
        at = (similarity >= low) & (similarity < high) & ~equal
        formula = np.mean(1 - (1 - similarity[at] ** CONFIG.rows) ** CONFIG.bands)
        print(
            f"[{low:.1f}, {min(high, 1):.1f}{']' if high > 1 else ')'}  {np.sum(at):7}  {np.sum(met[at]):5}"
            f"  {np.mean(met[at]):5.3f}  {formula:14.3f}"
        )


def similar_pairs(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, Jaccard similarity of their sets of runs) of all pairs with a run in common."""
    runs = [np.unique(ngram_hashes(word_hashes(text), CONFIG.ngram)) for text in texts]
    sizes = np.array([len(found) for found in runs])
    _, columns = np.unique(np.concatenate(runs), return_inverse=True)
    member = csr_array((np.ones(len(columns), np.int32), columns, np.concatenate([[0], np.cumsum(sizes)])))
    common = (member @ member.T).tocoo()
    upper = common.row < common.col
    first, second, both = common.row[upper], common.col[upper], common.data[upper]
    return first, second, both / (sizes[first] + sizes[second] - both)


def band_keys(path: Path, n_documents: int) -> np.ndarray:
    """(bands, documents, 2): both halves of each key; a document without one gets its own number."""
    keys = np.broadcast_to(np.arange(n_documents, dtype=np.uint64)[:, None], (CONFIG.n_bands, n_documents, 2)).copy()
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for band in range(CONFIG.n_bands):
            key, low, row = (column.to_numpy() for column in reader.get_batch(band).columns)
            keys[band, row] = np.stack([key, low], axis=1)
    return keys


if __name__ == "__main__":
    main()
