"""Measure how much of the text a given tokenizer loses, before anything is tokenized with it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.executor.tasks import Done
from data_tools.formatting import format_bytes, format_share
from data_tools.stages.select import SplitConfig, UnitInput, keyed_hash, select, selected_texts
from megagpt.tokenizer.tokenizer import Tokenizer

MEASURED_BYTES = 2**23
SECTION = 2**14  # characters
SHOWN, SHOWN_LETTERS = 8, 12  # of what is lost: parts, and characters of each


def share_to_measure(text_bytes: int) -> float:
    """Return the share of a corpus of text_bytes bytes that is about MEASURED_BYTES."""
    return min(1.0, MEASURED_BYTES / max(text_bytes, 1))


def measure_lost_text(
    prefix: Path,
    unit: UnitInput,
    clusters: Path | None,
    splits: SplitConfig,
    model: Path,
    model_sha256: str,
    share: float,
) -> dict[str, Any]:
    """Run as a task: measure a share of a unit's text, in sections that are drawn by a keyed hash.

    The sections are small, so that many are drawn of any corpus that is larger than what is measured.
    """
    tokenizer = Tokenizer.load(model, sha256=model_sha256)
    scratch = prefix.parents[1]
    selection = select(unit, scratch, clusters, splits)
    n_bytes, n_lost, most = 0, 0, Counter[str]()
    for piece, (row, text) in enumerate(selected_texts(scratch / unit.texts, selection)):
        for at in range(0, len(text), SECTION):
            key = selection.documents[row].doc + f"lost {piece}:{at}".encode()
            if keyed_hash(key, splits.seed) >= share * 2**64:
                continue
            section = text[at : at + SECTION]
            lost = tokenizer.lost(section)
            n_bytes, n_lost = n_bytes + len(section.encode()), n_lost + lost.total()
            for part, size in lost.items():
                most[part[:SHOWN_LETTERS]] += size
    return {"bytes": n_bytes, "lost": n_lost, "most": dict(most.most_common(100))}


def lost_text_of(measured: Sequence[Done]) -> dict[str, Any]:
    """Return how many bytes were measured, the share of them that is lost, and what is lost most."""
    results = [done.result for done in measured]
    n_bytes, n_lost = (sum(result[key] for result in results) for key in ("bytes", "lost"))
    most = sum((Counter(result["most"]) for result in results), Counter[str]())
    return {
        "measured": n_bytes,
        "share": n_lost / max(n_bytes, 1),
        "most": [part for part, _ in most.most_common(SHOWN)],
    }


def describe_lost_text(found: dict[str, Any], tokenizer: Path | None) -> str:
    """Tell how much is lost, and the way out."""
    return (
        f"tokenizer={tokenizer} loses {format_share(found['share'])} of the text (of {format_bytes(found['measured'])} "
        f"measured), most of all {', '.join(map(repr, found['most']))}: it has no pieces for them, or changes them; "
        "without tokenizer=, one is trained that loses nothing"
    )
