"""The first stage: a unit of input to cleaned documents, and those that a rule rejected."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.config import SourceConfig
from data_tools.executor.tasks import Done, Tasks, file_of
from data_tools.filters.rules import RulesConfig, apply_rules, check_rules, clean_only, load_custom
from data_tools.readers.by_format import read_slice
from data_tools.readers.document_pieces import DocumentPiece, SkippedRecord
from data_tools.readers.find_files import find_files
from data_tools.readers.work_units import WorkUnit, cut_into_units
from data_tools.stages.select import UnitInput
from data_tools.storage.document_store import DocumentWriter, open_documents
from data_tools.storage.rejects import REJECTS, RejectWriter, open_rejects
from megagpt.atomic_files import sha256_of


def find_units(sources: Sequence[SourceConfig], leave_out: Path | None = None) -> list[WorkUnit]:
    """What there is to read outside of `leave_out`. Raises UserError for an input or a rule that cannot work."""
    for source in sources:
        check_rules(source.rules)
    return cut_into_units([(source.name, find_files(source, leave_out)) for source in sources])


def extract_all(units: Sequence[WorkUnit], sources: Sequence[SourceConfig], strict: bool, tasks: Tasks) -> list[Done]:
    named = {source.name: source for source in sources}
    code = {source.name: _code_hashes(source.rules) for source in sources}
    return tasks.run(extract, [(unit, named[unit.source], strict, code[unit.source]) for unit in units], "reading")


def describe_units(
    units: Sequence[WorkUnit],
    sources: Sequence[SourceConfig],
    texts: Sequence[Done],
    contamination: Sequence[Path | None],
    scratch: Path,
) -> list[UnitInput]:
    """What the later stages have to know of each unit."""
    numbers = {source.name: number for number, source in enumerate(sources)}
    files = {source.name: 0 for source in sources}  # begun so far; one that is listed twice counts twice
    unit_inputs = []
    for number, (unit, done, found) in enumerate(zip(units, texts, contamination, strict=True)):
        own = []
        for part in unit.slices:
            files[unit.source] += part.start == 0
            own.append(files[unit.source] - 1)
        unit_inputs.append(
            UnitInput(
                number=number,
                source=numbers[unit.source],
                files=tuple(own),
                texts=str(done.prefix.relative_to(scratch)),
                contamination=str(found.relative_to(scratch)) if found else None,
            )
        )
    return unit_inputs


def why_nothing_is_left(texts: Sequence[Done], tokens: Sequence[Done] = ()) -> str:
    """ "; skipped: ..." with every reason that took documents away, or nothing."""
    reasons: dict[str, str] = {}
    for done in texts:
        for reason, (n, first) in done.result["skipped"].items():
            reasons.setdefault(reason, f"skipped: {n} {reason} (first: {first})")
        for rule, (n, _) in done.result["rejected"].items():
            reasons.setdefault(rule, f"rejected: {n} by {rule}")
    for done in tokens:
        for rule, (n, _) in done.result["dropped"].items():
            reasons.setdefault(rule, f"dropped: {n} {rule}")
    return "".join(f"; {reason}" for reason in reasons.values())


def _code_hashes(rules: RulesConfig) -> dict[str, str]:
    """Of what the rules load from outside, so that an edited function is not taken for the one that ran before."""
    files = [str(rules.language.model)] if rules.language else []
    modules = [getattr(load_custom(path), "__module__", None) for path in rules.custom]
    files += [file for name in modules if (file := getattr(sys.modules.get(name or ""), "__file__", None))]
    return {file: sha256_of(Path(file)) for file in files}


def extract(prefix: Path, unit: WorkUnit, source: SourceConfig, strict: bool, code: dict[str, str]) -> dict[str, Any]:
    """Read, clean and filter a unit. `code` holds the hashes of what the rules load: it only names the task.

    A document of more than one piece is judged by its first.
    """
    with open_documents(prefix) as texts, open_rejects(file_of(prefix, REJECTS)) as rejects:
        extraction = _Extraction(texts, rejects, source.rules)
        for number, part in enumerate(unit.slices):
            for item in read_slice(part, source, strict=strict):
                if isinstance(item, SkippedRecord):
                    extraction.skip(item, number)
                else:
                    extraction.take(item, number, part.file.path)
    return extraction.result()


class _Extraction:
    """What one unit's documents become, and how many of each there were."""

    def __init__(self, texts: DocumentWriter, rejects: RejectWriter, rules: RulesConfig) -> None:
        self._texts, self._rejects, self._rules = texts, rejects, rules
        self._asks_rules = rules != RulesConfig()
        self._rejected_by: str | None = None
        self._read = [0, 0]  # documents, bytes
        self._skipped: dict[str, list[Any]] = {}  # reason -> documents, where the first one is
        self._cleaned: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()

    def skip(self, item: SkippedRecord, part: int) -> None:
        if self._texts.is_open:  # it came to light within a document
            self._texts.end(part, 0, kept=False)
        if item.reason not in self._skipped:
            self._skipped[item.reason] = [0, item.where()]
        self._skipped[item.reason][0] += 1

    def take(self, piece: DocumentPiece, part: int, path: str) -> None:
        text = self._clean(piece) if self._asks_rules else piece.text
        size = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        self._read[0] += piece.is_first
        self._read[1] += size
        if self._rejected_by is not None:
            self._rejects.count(self._rejected_by, piece.is_first, size)
            self._rejects.write(self._rejected_by, text, file=path, position=piece.position)
            return
        if piece.is_first:
            self._texts.begin()
        self._texts.add(text)
        if piece.is_last:
            self._lengths[self._texts.size.bit_length()] += 1
            self._texts.end(part, piece.position)

    def _clean(self, piece: DocumentPiece) -> str:
        """The cleaned text; with a document's first piece, also decides whether the document stays."""
        judged = apply_rules(piece.text, self._rules) if piece.is_first else clean_only(piece.text, self._rules)
        if piece.is_first:
            self._cleaned.update(judged.changed)
            self._rejected_by = judged.rejected_by
        return judged.text

    def result(self) -> dict[str, Any]:
        return {
            "read": self._read,
            "kept": [self._texts.kept, self._texts.kept_bytes],
            "skipped": self._skipped,
            "rejected": self._rejects.documents,
            "cleaned": dict(self._cleaned),
            "lengths": dict(self._lengths),
            "sha256": self._texts.sha256,
        }
