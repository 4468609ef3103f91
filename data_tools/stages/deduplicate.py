"""Deduplication and decontamination as tasks of a build, on the files of earlier tasks."""

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
from data_tools.readers.work_units import cut_into_units
from data_tools.stages.select import CLUSTERS, CONTAMINATED, contaminated_rows
from data_tools.storage.document_store import read_documents, read_pieces
from megagpt.atomic_files import written

BANDS, LINKS, NGRAMS = ".bands.arrow", ".links.arrow", ".npy"
LINK_DOCUMENTS = 2**22  # about so many in one range of keys: 100 MB in memory


def find_clusters(
    texts: Sequence[Done], contamination: Sequence[Path | None], config: DedupConfig, seed: int, tasks: Tasks
) -> Done | None:
    """What is alike, over all units; None where nobody asked. What is dropped anyway is nobody's copy."""
    if config.method == "none":
        return None
    rule = config.model_copy(update={"duplicates": "remove"})  # what becomes of copies is not decided here
    jobs = [(done.prefix, found, rule, seed) for done, found in zip(texts, contamination, strict=True)]
    bands = tasks.run(sign, jobs, "comparing")
    listed = tasks.run_one(write_list, [file_of(done.prefix, BANDS).name for done in bands], what="listing")
    documents = sum(done.result["kept"][0] for done in texts)
    n_parts = -(-documents // LINK_DOCUMENTS) or 1
    ranges = [(listed.prefix, band, part, n_parts) for band in range(rule.n_bands) for part in range(n_parts)]
    links = tasks.run(link_band, ranges, "linking")
    return tasks.run_one(join, [file_of(done.prefix, LINKS).name for done in links], what="clustering")


def sign(prefix: Path, texts: Path, contamination: Path | None, config: DedupConfig, seed: int) -> Result:
    documents, dropped = read_documents(texts), contaminated_rows(contamination)
    kept = [document.kept and row not in dropped for row, document in enumerate(documents)]
    pieces = ((row, text) for row, text in read_pieces(texts) if kept[row])
    write_bands(pieces, len(documents), file_of(prefix, BANDS), config, seed=seed)
    return {}


def link_band(prefix: Path, listed: Path, band: int, part: int, n_parts: int) -> Result:
    files = [prefix.parents[1] / sign.__name__ / name for name in read_list(listed)]
    return {"links": link(files, band, part, n_parts, file_of(prefix, LINKS))}


def join(prefix: Path, names: Sequence[str]) -> Result:
    return cluster([prefix.parents[1] / link_band.__name__ / name for name in names], file_of(prefix, CLUSTERS))


def check_files(config: DecontaminationConfig) -> None:
    """Raises UserError for a file that is not there, before hours are spent on the corpus."""
    if config.files:
        find_files(_source_of(config))


def _source_of(config: DecontaminationConfig) -> SourceConfig:
    return SourceConfig(name="decontamination", paths=config.files)


def find_contaminated(texts: Sequence[Done], config: DecontaminationConfig, tasks: Tasks) -> list[Path | None]:
    """For each unit, the prefix of what names its contaminated rows."""
    if not config.files:
        return [None for _ in texts]
    source = _source_of(config)
    states = [(file.path, file.size, file.state) for file in find_files(source)]
    ngrams = tasks.run_one(collect_ngrams, source, config, states, what="reading what must not be in the data")
    return [
        done.prefix for done in tasks.run(mark, [(done.prefix, ngrams.prefix, config) for done in texts], "searching")
    ]


def collect_ngrams(prefix: Path, source: SourceConfig, config: DecontaminationConfig, states: object) -> Result:
    """Of the user's files; `states` only names the task, so that an edited file is read again."""
    return write_ngrams(_texts_of(source), file_of(prefix, NGRAMS), config)


def _texts_of(source: SourceConfig) -> Iterator[Iterator[str]]:
    """The pieces of each document."""
    for unit in cut_into_units([(source.name, find_files(source))]):
        for part in unit.slices:
            pieces = (item for item in read_slice(part, source, strict=True) if isinstance(item, DocumentPiece))
            for _, group in groupby(pieces, key=attrgetter("position")):
                yield (piece.text for piece in group)


def mark(prefix: Path, texts: Path, ngrams: Path, config: DecontaminationConfig) -> Result:
    """The rows of a unit's documents that hold what the user's files hold."""
    known = read_ngrams(file_of(ngrams, NGRAMS))
    rows = [
        row
        for row, group in groupby(read_pieces(texts), key=itemgetter(0))
        if is_contaminated((text for _, text in group), known, config)
    ]
    with written(file_of(prefix, CONTAMINATED)) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(rows, np.uint32))
    return {"documents": len(rows)}
