"""Cut long documents where there are too few documents for the fractions of the splits.

Splitting whole documents by their hashes needs many of them: one text file is in one split. Where a split would get
none, or far from its share of the text, the long documents are cut by position instead: the first part is for
training, the last ones are held out. All shorter documents stay whole. This comes after deduplication, so that no part
is a copy of another.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path

from data_tools.dedup.lsh import clustered_rows
from data_tools.executor.tasks import Done, Result, Tasks, file_of
from data_tools.stages.select import (
    CLUSTERS,
    PARTS,
    Part,
    SplitConfig,
    UnitInput,
    contaminated_rows,
    cut_pieces,
    select,
)
from data_tools.storage.document_store import read_documents, read_pieces
from megagpt.atomic_files import written
from megagpt.data.manifest import SPLITS, Split
from megagpt.data.shard_format import HASH_BYTES

FEW = 10  # documents that a split should get: with that many, hashes do not miss it
LEAST: dict[Split, float] = {"train": 0.5, "val": 0.1, "test": 0.1}  # of its share of the text, and
MOST = 3.0  # times its share; one of three files is more than three times a tenth
PART_BYTES = 2**10  # a document is long if each of its parts has at least this many
WINDOW = 2**16  # bytes: how far from its place a cut may be
# the ends of paragraphs, lines and words: a document is cut at one of the first kind that is near
BREAKS = (rb"\n(?:[ \t\r]*\n)+", rb"\r\n|\n|\r", rb"[ \t]+")
LongDocuments = dict[int, list[int]]  # unit -> rows


def cut_where_few(
    units: Sequence[UnitInput], extracted: Sequence[Done], clusters: Done | None, splits: SplitConfig, tasks: Tasks
) -> tuple[list[UnitInput], int]:
    """Return the units with their documents cut, and the number of these; the units as they are if there are enough."""
    wanted = {split: share for split, share in splits.shares.items() if share}
    copies = sum(clusters.result[how] for how in ("exact", "near")) if clusters else 0
    own = [unit for unit in units if splits.given_split(unit.number) is None]
    contaminated = sum(len(contaminated_rows(unit.paths(tasks.folder)[1])) for unit in own)
    # a lower bound: a copy may be contaminated too, or be in an input with a split of its own
    documents = sum(extracted[unit.number].result["kept"][0] for unit in own) - copies - contaminated
    if len(wanted) == 1 or documents * min(wanted.values()) >= FEW:
        return list(units), 0
    prefix = clusters.prefix if clusters else None
    measured = [done.result for done in tasks.run(measure, [(unit, prefix, splits) for unit in own], "measuring")]
    sizes = {split: sum(result["bytes"][split] for result in measured) for split in SPLITS}
    expected = {split: share * sum(sizes.values()) for split, share in wanted.items()}
    if all(LEAST[split] * expected[split] <= sizes[split] <= MOST * expected[split] for split in wanted):
        return list(units), 0
    rows, shares = _choose([unit.number for unit in own], measured, wanted)
    jobs = [(unit.texts, rows[unit.number], shares) for unit in own if unit.number in rows]
    cuts = dict(zip(rows, tasks.run(cut, jobs, "cutting"), strict=True))
    named = {number: str(done.prefix.relative_to(tasks.folder)) for number, done in cuts.items()}
    with_parts = [unit.model_copy(update={"parts": named.get(unit.number)}) for unit in units]
    return with_parts, sum(done.result["documents"] for done in cuts.values())


def measure(prefix: Path, unit: UnitInput, clusters: Path | None, splits: SplitConfig) -> Result:
    """Run as a task: add up the bytes of a unit's documents in each split, and find those that may be cut."""
    selection = select(unit, prefix.parents[1], clusters, splits)
    sizes = {row: document.bytes for row, document in enumerate(selection.documents) if row not in selection.dropped}
    totals = dict.fromkeys(SPLITS, 0)
    for row, size in sizes.items():
        totals[selection.splits[row]] += size
    # where copies are kept, one of them may hold in its first part what another has in its last
    whole = clustered_rows(unit.number, file_of(clusters, CLUSTERS)) if clusters else set()
    may_be_cut = [(size, row) for row, size in sizes.items() if splits.duplicates == "remove" or row not in whole]
    long = [row for size, row in may_be_cut if size * min(filter(None, splits.shares.values())) >= PART_BYTES]
    longest = max(may_be_cut, key=lambda found: (found[0], -found[1]), default=None)
    return {"bytes": totals, "long": long, "longest": longest}


def _choose(
    units: Sequence[int], measured: Sequence[Result], wanted: dict[Split, float]
) -> tuple[LongDocuments, dict[Split, float]]:
    """Return the documents to cut, and the share of each of their parts: all long ones, or else the longest alone.

    The longest alone gives what the whole corpus needs, but not more than half of it, or than the fractions.
    """
    if long := {unit: result["long"] for unit, result in zip(units, measured, strict=True) if result["long"]}:
        return long, wanted
    found = [(unit, *result["longest"]) for unit, result in zip(units, measured, strict=True) if result["longest"]]
    if not found:
        return {}, wanted
    unit, size, row = max(found, key=lambda one: (one[1], -one[0]))
    total = sum(sum(result["bytes"].values()) for result in measured)
    held_out = {split: share for split, share in wanted.items() if split != "train"}
    share = sum(held_out.values())
    times = min(total / size, max(0.5, share) / share)
    shares = {split: times * own if split in held_out else 1 - times * share for split, own in wanted.items()}
    return {unit: [row]}, shares


def cut(prefix: Path, texts: str, rows: Sequence[int], shares: dict[Split, float]) -> Result:
    """Run as a task: write where each of a unit's documents is cut, and the hash of each part."""
    path = prefix.parents[1] / texts
    sizes = {row: read_documents(path)[row].bytes for row in rows}
    ends = {row: find_ends(pieces, sizes[row], list(shares.values())) for row, pieces in _documents(path, rows)}
    found = {row: _parts(pieces, list(shares), ends[row]) for row, pieces in _documents(path, rows)}
    parts = {row: [part.model_dump() for part in own] for row, own in found.items() if own}
    with written(file_of(prefix, PARTS)) as temporary:
        temporary.write_bytes(json.dumps(parts).encode())
    return {"documents": len(parts)}


def _documents(texts: Path, rows: Sequence[int]) -> Iterator[tuple[int, Iterator[str]]]:
    """Yield (row, pieces) of some documents of a unit."""
    wanted = set(rows)
    for row, group in groupby(read_pieces(texts), key=itemgetter(0)):
        if row in wanted:
            yield row, (text for _, text in group)


def find_ends(pieces: Iterable[str], size: int, shares: Sequence[float]) -> list[int]:
    """Return the ends of a document's parts, each after the paragraph or line nearest to its share of `size` bytes."""
    places = [0, *(int(share * size) for share in accumulate(shares[:-1])), size]
    rooms = [
        min(WINDOW, (at - before) // 2, (after - at) // 2)
        for before, at, after in zip(places, places[1:], places[2:], strict=False)
    ]
    # at least one whole character, of at most 4 bytes
    windows = [(at - room, at + max(room, 4)) for at, room in zip(places[1:], rooms, strict=False)]
    texts = _read_windows(pieces, windows)
    found = [low + _nearest_break(text, room) for (low, _), text, room in zip(windows, texts, rooms, strict=True)]
    return [*accumulate(found, max), size]


def _read_windows(pieces: Iterable[str], windows: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return some ranges of a document's bytes, without having all of it in memory."""
    found = [bytearray() for _ in windows]
    at = 0
    for text in pieces:
        data = text.encode()
        for own, (low, high) in zip(found, windows, strict=True):
            own += data[max(0, low - at) : max(0, high - at)]
        at += len(data)
    return list(map(bytes, found))


def _nearest_break(text: bytes, at: int) -> int:
    """Return the end nearest to `at` of a paragraph, otherwise of a line, a word or a character."""
    for pattern in BREAKS:
        ends = [end for found in re.finditer(pattern, text) if (end := found.end()) < len(text)]
        if ends:
            return min(ends, key=lambda end: abs(end - at))
    while at < len(text) and text[at] & 0xC0 == 0x80:  # within a character of several bytes
        at += 1
    return at


def _parts(pieces: Iterable[str], splits: Sequence[Split], ends: Sequence[int]) -> list[Part]:
    """Return the parts of a document; none if one of them would have no text, so that the document stays whole."""
    hashes = [hashlib.blake2b(digest_size=HASH_BYTES) for _ in ends]
    has_text = [False for _ in ends]
    for part, text in cut_pieces(pieces, ends):
        hashes[part].update(text.encode())
        has_text[part] |= bool(text.strip())
    if not all(has_text):
        return []
    starts = [0, *ends]
    return [
        Part(split=split, end=end, bytes=end - start, doc=content.hexdigest())
        for split, start, end, content in zip(splits, starts, ends, hashes, strict=False)
    ]
