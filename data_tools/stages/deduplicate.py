"""Deduplication and decontamination as tasks of a build, which read and write the files of a unit.

The algorithms are in dedup/: lsh.py finds copies, decontamination.py finds n-grams of test sets. Functions named in
tasks.run() are tasks; `prefix` is where their own files go, the other paths are the prefixes of earlier tasks.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path

import numpy as np

from data_tools.config import SourceConfig
from data_tools.dedup.decontamination import DecontaminationConfig, is_contaminated, read_ngrams, write_ngrams
from data_tools.dedup.lsh import DedupConfig, cluster, link, write_bands
from data_tools.executor.tasks import Done, Result, Tasks, file_of, read_list, write_list
from data_tools.readers.by_format import read_slice
from data_tools.readers.document_pieces import DocumentPiece
from data_tools.readers.find_files import find_files
from data_tools.readers.first_records import check_first_records
from data_tools.readers.work_units import cut_into_units
from data_tools.stages.select import CLUSTERS, CONTAMINATED, contaminated_rows
from data_tools.storage.document_store import read_documents, read_pieces
from megagpt.atomic_files import written

BANDS, LINKS, NGRAMS = ".bands.arrow", ".links.arrow", ".npy"
LINK_DOCUMENTS = 2**22  # roughly, per range of keys: 100 MB in memory


def find_clusters(
    extracted: Sequence[Done], contamination: Sequence[Path | None], config: DedupConfig, seed: int, tasks: Tasks
) -> Done | None:
    """Find duplicates over all units; None with method none. Contaminated and broken documents take no part."""
    if config.method == "none":
        return None
    # whether copies are dropped is decided later: with one value here, both choices share these tasks
    rule = config.model_copy(update={"duplicates": "remove"})
    jobs = [(done.prefix, found, rule, seed) for done, found in zip(extracted, contamination, strict=True)]
    sizes = [done.result["kept"][1] for done in extracted]
    bands = tasks.run(sign, jobs, "comparing", sizes)
    listed = tasks.run_one(write_list, [file_of(done.prefix, BANDS).name for done in bands], what="listing")
    documents = sum(done.result["kept"][0] for done in extracted)
    n_ranges = -(-documents // LINK_DOCUMENTS) or 1
    ranges = [(listed.prefix, band, i, n_ranges) for band in range(rule.n_bands) for i in range(n_ranges)]
    links = tasks.run(link_band, ranges, "linking")
    return tasks.run_one(join, [file_of(done.prefix, LINKS).name for done in links], what="clustering")


def sign(prefix: Path, texts: Path, contamination: Path | None, config: DedupConfig, seed: int) -> Result:
    """Run as a task: write the keys of a unit's documents in each band."""
    documents, dropped = read_documents(texts), contaminated_rows(contamination)
    kept = [document.kept and row not in dropped for row, document in enumerate(documents)]
    pieces = ((row, text) for row, text in read_pieces(texts) if kept[row])
    write_bands(pieces, len(documents), file_of(prefix, BANDS), config, seed=seed)
    return {}


def link_band(prefix: Path, listed: Path, band: int, key_range: int, n_ranges: int) -> Result:
    """Run as a task: link the documents of all units that share a key in one range of one band."""
    files = [prefix.parents[1] / sign.__name__ / name for name in read_list(listed)]
    return {"links": link(files, band, key_range, n_ranges, file_of(prefix, LINKS))}


def join(prefix: Path, names: Sequence[str]) -> Result:
    """Run as a task: join all links into clusters."""
    return cluster([prefix.parents[1] / link_band.__name__ / name for name in names], file_of(prefix, CLUSTERS))


def check_files(config: DecontaminationConfig) -> None:
    """Raise UserError for a test set that cannot be read, before hours are spent on the corpus."""
    if config.files:
        source = _source_of(config)
        check_first_records(source, find_files(source), strict=True)


def _source_of(config: DecontaminationConfig) -> SourceConfig:
    return SourceConfig(name="decontamination", paths=config.files)


def find_contaminated(extracted: Sequence[Done], config: DecontaminationConfig, tasks: Tasks) -> list[Path | None]:
    """Return, for each unit, the prefix of the file of its contaminated rows; None without test sets."""
    if not config.files:
        return [None for _ in extracted]
    source = _source_of(config)
    states = [(file.path, file.size, file.state) for file in find_files(source)]
    ngrams = tasks.run_one(collect_ngrams, source, config, states, what="reading test sets")
    jobs = [(done.prefix, ngrams.prefix, config) for done in extracted]
    return [done.prefix for done in tasks.run(mark, jobs, "searching", [done.result["kept"][1] for done in extracted])]


def collect_ngrams(prefix: Path, source: SourceConfig, config: DecontaminationConfig, states: object) -> Result:
    """Run as a task: write the n-grams of the test sets.

    `states` only enters the task's name, for files that are edited.
    """
    return write_ngrams(_texts_of(source), file_of(prefix, NGRAMS), config)


def _texts_of(source: SourceConfig) -> Iterator[Iterator[str]]:
    """Yield each document as an iterator of its pieces."""
    for unit in cut_into_units([(source.name, find_files(source))]):
        for slice_ in unit.slices:
            pieces = (piece for piece in read_slice(slice_, source, strict=True) if isinstance(piece, DocumentPiece))
            for _, group in groupby(pieces, key=attrgetter("position")):
                yield (piece.text for piece in group)


def mark(prefix: Path, texts: Path, ngrams: Path, config: DecontaminationConfig) -> Result:
    """Run as a task: write the rows of a unit's contaminated documents."""
    known = read_ngrams(file_of(ngrams, NGRAMS))
    rows = [
        row
        for row, group in groupby(read_pieces(texts), key=itemgetter(0))
        if is_contaminated((text for _, text in group), known, config)
    ]
    with written(file_of(prefix, CONTAMINATED)) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(rows, np.uint32))
    return {"documents": len(rows)}
