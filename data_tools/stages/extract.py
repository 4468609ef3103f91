"""The first stage: read a work unit, clean its documents, and write those that the rules keep or reject."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_tools.config import SourceConfig
from data_tools.executor.progress import advance
from data_tools.executor.tasks import Done, Tasks, file_of
from data_tools.filters.rules import RulesConfig, apply_rules, check_rules, clean_only, load_custom
from data_tools.readers.by_format import FORMATS, METADATA, read_slice
from data_tools.readers.document_pieces import DocumentPiece, Note, SkippedRecord
from data_tools.readers.find_files import find_files
from data_tools.readers.first_records import check_first_records
from data_tools.readers.formats.fields import CHAT_VERSION
from data_tools.readers.input_file import InputFile, UnreadableFile
from data_tools.readers.split_names import given_split, names_like_splits
from data_tools.readers.work_units import WorkUnit, cut_into_units
from data_tools.stages.select import GIVEN, UnitInput
from data_tools.stages.what_is_left import add_up, tell_what_rules_took
from data_tools.storage.document_store import DocumentWriter, open_documents
from data_tools.storage.rejects import REJECTS, RejectWriter, open_rejects
from megagpt.atomic_files import sha256_of
from megagpt.data.manifest import Split
from megagpt.errors import UserError


def find_units(
    sources: Sequence[SourceConfig], leave_out: Path | None = None, *, strict: bool = False
) -> list[WorkUnit]:
    """Return the work units of all sources, without files in `leave_out`. Raises UserError for a bad input or rule.

    A unit has one given split. Units come in the order of GIVEN: of equal documents the first stays, so a held-out one.
    """
    for source in sources:
        check_rules(source.rules)
    found = [(source, find_files(source, leave_out)) for source in sources]
    by_split: dict[Split | None, dict[str, list[InputFile]]] = {split: {} for split in GIVEN}
    for source, files in found:
        for file in files:
            by_split[given_split(file, source)].setdefault(source.name, []).append(file)
    for source, files in found:
        check_first_records(source, files, strict=strict)
    groups, held_out = [], set[str]()
    for split in GIVEN:
        for name, files in by_split[split].items():
            # as in --input corpus/ --val corpus/valid.txt
            own = [file for file in files if not held_out or os.path.realpath(file.path) not in held_out]
            groups.append((name, own))
        if split in ("test", "val"):
            held_out |= {os.path.realpath(file.path) for files in by_split[split].values() for file in files}
    return cut_into_units(groups, skip_unreadable=not strict)


def text_bytes(extracted: Sequence[Done]) -> list[int]:
    """Return the bytes of text that each unit holds, which later stages read."""
    return [done.result["kept"][1] for done in extracted]


def given_units(units: Sequence[WorkUnit], sources: Sequence[SourceConfig]) -> tuple[int, int, int]:
    """Return the units at which those given as test end, then val, then train: SplitConfig.given."""
    named = {source.name: source for source in sources}
    splits = [given_split(unit.slices[0].file, named[unit.source]) for unit in units]
    test, val, train = accumulate(splits.count(split) for split in GIVEN[:-1])
    return test, val, train


def warn_of_names(units: Sequence[WorkUnit], sources: Sequence[SourceConfig]) -> str:
    """Return a warning if names look like splits, such as train.txt and valid.txt, and hashes split all; or nothing."""
    by_hash = {source.name: source for source in sources if source.split is None and source.splits == "by-hash"}
    all_files = (slice_.file for unit in units if unit.source in by_hash for slice_ in unit.slices)
    files = {file.path for file in all_files if file.kind != METADATA}
    found = names_like_splits(sorted(files), [path for source in by_hash.values() for path in source.paths])
    if not found:
        return ""
    named = ", ".join(f"{path} ({split})" for split, path in found.items())
    return (
        f"file names tell splits, but all of these files are mixed and split by fractions: {named}; "
        "to keep them apart, add splits=by-name to the command"
    )


def extract_all(units: Sequence[WorkUnit], sources: Sequence[SourceConfig], strict: bool, tasks: Tasks) -> list[Done]:
    """Run `extract` for every unit."""
    named = {source.name: source for source in sources}
    code = {source.name: _code_hashes(source.rules) for source in sources}
    jobs = [
        (unit, named[unit.source], strict, code[unit.source] | _reader_versions(unit, named[unit.source]))
        for unit in units
    ]
    extracted = tasks.run(extract, jobs, "reading", [unit.size for unit in units])
    tell_what_rules_took(extracted)
    unreadable = unreadable_files(extracted)
    if unreadable and len(unreadable) == len({slice_.file.path for unit in units for slice_ in unit.slices}):
        raise UserError(next(iter(unreadable.values())))
    return extracted


def unreadable_files(extracted: Sequence[Done]) -> dict[str, str]:
    """Return the files that could not be read to their end, each with its error."""
    # the results of a build that an older version began do not have the key
    return {path: why for done in extracted for path, why in done.result.get("unreadable", {}).items()}


def refuse_unreadable(extracted: Sequence[Done]) -> None:
    """Raise UserError if a file could not be read, for commands without a report that could name it."""
    if why := list(unreadable_files(extracted).values()):
        more = f" (and {len(why) - 1} more files)" if len(why) > 1 else ""
        raise UserError(why[0] + more)


def describe_units(
    units: Sequence[WorkUnit],
    sources: Sequence[SourceConfig],
    extracted: Sequence[Done],
    contamination: Sequence[Path | None],
    scratch: Path,
) -> list[UnitInput]:
    """Return what the later stages need to know of each unit."""
    numbers = {source.name: number for number, source in enumerate(sources)}
    n_files = {source.name: 0 for source in sources}  # found so far; a file that is given twice counts twice
    unit_inputs = []
    for number, (unit, done, found) in enumerate(zip(units, extracted, contamination, strict=True)):
        files = []
        for slice_ in unit.slices:
            n_files[unit.source] += slice_.start == 0
            files.append(n_files[unit.source] - 1)
        unit_inputs.append(
            UnitInput(
                number=number,
                source=numbers[unit.source],
                files=tuple(files),
                texts=str(done.prefix.relative_to(scratch)),
                contamination=str(found.relative_to(scratch)) if found else None,
            )
        )
    return unit_inputs


def why_nothing_is_left(extracted: Sequence[Done], tokenized: Sequence[Done] = ()) -> str:
    """Return the end of a message, "; skipped: ...", with every reason for dropped documents; may be empty."""
    reasons = list(unreadable_files(extracted).values())[:1]
    skipped: dict[str, list[Any]] = {}
    for done in extracted:
        for reason, (n, first) in done.result["skipped"].items():
            skipped.setdefault(reason, [0, first])[0] += n
    reasons += [f"skipped: {n:,} {reason} (first: {first})" for reason, (n, first) in skipped.items()]
    rejected = add_up(done.result["rejected"] for done in extracted)
    reasons += [f"rejected: {n:,} by {rule}" for rule, (n, _) in rejected.items()]
    dropped = add_up(done.result["dropped"] for done in tokenized)
    reasons += [f"dropped: {n:,} {rule}" for rule, (n, _) in dropped.items()]
    return "".join(f"; {reason}" for reason in reasons)


def _code_hashes(rules: RulesConfig) -> dict[str, str]:
    """Return the hashes of the files that the rules load: a resumed build does not reuse the work of an older rule."""
    files = [str(rules.language.model)] if rules.language else []
    modules = [getattr(load_custom(path), "__module__", None) for path in rules.custom]
    files += [file for name in modules if (file := getattr(sys.modules.get(name or ""), "__file__", None))]
    return {file: sha256_of(Path(file)) for file in files}


def _reader_versions(unit: WorkUnit, source: SourceConfig) -> dict[str, str]:
    """Return the versions of readers that have changed: a resumed build does not reuse the work of an older one."""
    versions = {slice_.file.kind: FORMATS[slice_.file.kind].version for slice_ in unit.slices}
    if source.chat_template:
        versions["chat"] = CHAT_VERSION
    return {kind: str(version) for kind, version in versions.items() if version > 1}


def extract(prefix: Path, unit: WorkUnit, source: SourceConfig, strict: bool, code: dict[str, str]) -> dict[str, Any]:
    """Run as a task: read, clean and filter a unit. `code`, hashes and versions, only enters the task's name.

    The rules see only the first piece of a long document.
    """
    with open_documents(prefix) as texts, open_rejects(file_of(prefix, REJECTS)) as rejects:
        extraction = _Extraction(texts, rejects, source.rules)
        for number, slice_ in enumerate(unit.slices):
            try:
                for piece in read_slice(slice_, source, strict=strict):
                    if isinstance(piece, SkippedRecord):
                        extraction.skip(piece, number)
                    elif isinstance(piece, Note):
                        extraction.note(piece)
                    else:
                        size = extraction.take(piece, number, slice_.file.path)
                        # of a compressed file, open_file.py counts what is read of it
                        advance(0 if slice_.file.compression else size)
            except UnreadableFile as error:
                if strict:
                    raise
                extraction.give_up(slice_.file.path, str(error), number)
    return extraction.result()


class _Extraction:
    """Writes the documents of one unit and counts what became of them."""

    def __init__(self, texts: DocumentWriter, rejects: RejectWriter, rules: RulesConfig) -> None:
        self._texts, self._rejects, self._rules = texts, rejects, rules
        self._has_rules = rules != RulesConfig()
        self._rejected_by: str | None = None  # the verdict on the document that is being read
        self._read = [0, 0]  # documents, bytes
        self._unreadable: dict[str, str] = {}  # file -> error
        self._notes: dict[str, list[Any]] = {}  # as _skipped
        self._skipped: dict[str, list[Any]] = {}  # reason -> number of records, place of the first
        self._cleaned: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()  # bit length of a document's bytes -> documents

    def give_up(self, path: str, why: str, slice_: int) -> None:
        """Take note of a file that cannot be read any further; its documents so far stay."""
        self._drop_open(slice_)
        self._unreadable[path] = why

    def _drop_open(self, slice_: int) -> None:
        """Drop the document of which the rest cannot be read, if there is one."""
        if self._texts.is_open:
            self._texts.end(slice_, 0, kept=False)

    def skip(self, record: SkippedRecord, slice_: int) -> None:
        self._drop_open(slice_)
        _count(self._skipped, record.reason, record.where)

    def note(self, note: Note) -> None:
        _count(self._notes, note.text, note.where)

    def take(self, piece: DocumentPiece, slice_: int, path: str) -> int:
        """Write the next piece of a document; returns its bytes."""
        text = self._clean(piece) if self._has_rules else piece.text
        size = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        self._read[0] += piece.is_first
        self._read[1] += size
        if self._rejected_by is not None:
            self._rejects.count(self._rejected_by, piece.is_first, size)
            self._rejects.write(self._rejected_by, text, file=path, position=piece.position)
            return size
        if piece.is_first:
            self._texts.begin()
        self._texts.add(text)
        if piece.is_last:
            self._lengths[self._texts.size.bit_length()] += 1
            self._texts.end(slice_, piece.position)
        return size

    def _clean(self, piece: DocumentPiece) -> str:
        """Return the cleaned text. For a document's first piece, also decides whether the document stays."""
        verdict = apply_rules(piece.text, self._rules) if piece.is_first else clean_only(piece.text, self._rules)
        if piece.is_first:
            self._cleaned.update(verdict.changed)
            self._rejected_by = verdict.rejected_by
        return verdict.text

    def result(self) -> dict[str, Any]:
        """Return the task's result: counts for the report."""
        return {
            "read": self._read,
            "kept": [self._texts.kept, self._texts.kept_bytes],
            "skipped": self._skipped,
            "unreadable": self._unreadable,
            "notes": self._notes,
            "rejected": self._rejects.documents,
            "cleaned": dict(self._cleaned),
            "lengths": dict(self._lengths),
            "sha256": self._texts.sha256,
        }


def _count(counted: dict[str, list[Any]], reason: str, where: Callable[[], str]) -> None:
    """Count a record, and remember where the first was."""
    if reason not in counted:
        counted[reason] = [0, where()]
    counted[reason][0] += 1
