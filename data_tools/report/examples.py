"""A few examples for the report: of what each rule left out, and of what stayed. Read from files of the tasks."""

import io
import json
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.executor.tasks import Done, file_of
from data_tools.report.settings import without_secrets
from data_tools.stages.pipeline import Stages
from data_tools.stages.select import select, selected_texts
from data_tools.storage.rejects import REJECTS

EXAMPLES = 3  # of each rule, and of each source
SHOWN = 400  # characters of each
# of a corpus of terabytes, these are from its first files: a report should take seconds
MOST_UNITS, MOST_BYTES = 64, 2**22

Example = dict[str, str]  # where it is from, and the beginning of its text


def examples_left_out(stages: Stages) -> dict[str, list[Example]]:
    """Return examples of what each rule left out."""
    found: dict[str, list[Example]] = {}
    for key, units in (("rejected", stages.extracted), ("dropped", stages.tokenized)):
        for done in units[:MOST_UNITS]:
            _add_left_out(found, done, key)
    return found


def examples_kept(stages: Stages, source: int) -> list[Example]:
    """Return examples of a source's documents that stayed."""
    return list(islice(_kept_of(stages, source), EXAMPLES))


def _add_left_out(found: dict[str, list[Example]], done: Done, key: str) -> None:
    """Add the first documents of each rule that has too few examples so far."""
    wanted = {rule for rule in done.result[key] if len(found.get(rule, [])) < EXAMPLES}
    seen = None
    for line in _lines(file_of(done.prefix, REJECTS)) if wanted else ():
        record = json.loads(line)
        rule, where = record["rule"], _where(record)
        # a long document has several lines
        if rule in wanted and where != seen:
            own = found.setdefault(rule, [])
            own.append({"where": where, "text": record["text"][:SHOWN]})
            wanted -= {rule} if len(own) == EXAMPLES else set()
        seen = where
        if not wanted:
            return


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines in the first MOST_BYTES of a compressed file."""
    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as packed:
        left = MOST_BYTES
        for line in io.BufferedReader(packed):
            yield line
            if (left := left - len(line)) < 0:
                return


def _where(record: dict[str, Any]) -> str:
    """Return the file and the place in it of a rejected document, or the hash of one that was dropped later."""
    return _place(record["file"], record["position"]) if "file" in record else f"document {record['doc']}"


def _place(file: str, position: int) -> str:
    return without_secrets(f"{file}, at {position:,}" if position else file)


def _kept_of(stages: Stages, source: int) -> Iterator[Example]:
    """Yield the first documents of a source that are in a split."""
    for unit in (stages.unit_inputs[number] for number in stages.units_of_sources[source][:MOST_UNITS]):
        done = stages.extracted[unit.number]
        if not any(documents for documents, *_ in stages.tokenized[unit.number].result["counts"].values()):
            continue
        scratch = done.prefix.parents[1]
        selection = select(unit, scratch, stages.clusters, stages.splits)
        for row, pieces in groupby(selected_texts(scratch / unit.texts, selection), key=itemgetter(0)):
            document = selection.documents[row]
            path = stages.units[unit.number].slices[document.slice].file.path
            yield {"where": _place(path, document.position), "text": next(pieces)[1][:SHOWN]}
