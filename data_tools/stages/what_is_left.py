"""Tell what the rules and the comparison of documents took from the text, before anything that this causes."""

from collections.abc import Iterable, Mapping, Sequence

from data_tools.executor.progress import note, warn
from data_tools.executor.tasks import Done
from data_tools.formatting import format_bytes, format_share
from megagpt.terminal import builder_command, counted

SHOWN = 8  # reasons, those that took most
Taken = dict[str, list[int]]
"""Why documents are left out -> their number, and their bytes."""


def add_up(many: Iterable[Mapping[str, Sequence[int]]]) -> Taken:
    """Return the sums over tasks, the most bytes first."""
    total: Taken = {}
    for taken in many:
        for reason, (documents, size) in taken.items():
            own = total.setdefault(reason, [0, 0])
            own[0], own[1] = own[0] + documents, own[1] + size
    return dict(sorted(total.items(), key=lambda item: (-item[1][1], -item[1][0], item[0])))


def tell_what_rules_took(extracted: Sequence[Done]) -> None:
    """Print what is left after the rules and what each took, as a warning if that is less than half."""
    read, kept = (
        [sum(column) for column in zip(*(done.result[key] for done in extracted), strict=True)]
        for key in ("read", "kept")
    )
    taken = add_up(done.result["rejected"] for done in extracted)
    if (within := read[1] - kept[1] - sum(size for _, size in taken.values())) > read[1] / 100:
        steps = sorted({step for done in extracted for step in done.result["cleaned"]})
        taken[f"parts of documents ({', '.join(steps)})"] = [kept[0], within]
        taken = add_up([taken])
    if not taken:
        return
    what = f"the rules left {_left(kept, read)}; they took"
    way_out = (
        f"Their thresholds are for web prose: `{builder_command()} build --help` lists them, and docs/data.md says how "
        "to change one or switch a rule off."
    )
    _tell(what, taken, way_out, is_much=2 * kept[1] < read[1])


def tell_what_copies_took(drawn: Sequence[Done], extracted: Sequence[Done]) -> None:
    """Warn if less than half is left after deduplication and decontamination, with what each took."""
    # a build that an older version began has results without these counts
    taken = add_up(done.result.get("dropped", {}) for done in drawn)
    kept = [sum(done.result["kept"][i] for done in extracted) for i in (0, 1)]
    left = [kept[i] - sum(counts[i] for counts in taken.values()) for i in (0, 1)]
    if 2 * left[1] < kept[1]:
        what = f"copies of other documents and contaminated ones are dropped, which leaves {_left(left, kept)}"
        _tell(what, taken, "Set dedup.duplicates=keep to keep copies.", is_much=True)


def share_of_bytes(left: int, total: int) -> str:
    """Return such as "5.32 of 30.4 MB of text (17.5%)"."""
    size, whole = format_bytes(left), format_bytes(total)
    size = size.removesuffix(whole[whole.index(" ") :])  # one unit for both
    return f"{size} of {whole} of text ({format_share(left / max(total, 1))})"


def _left(left: Sequence[int], total: Sequence[int]) -> str:
    return f"{share_of_bytes(left[1], total[1])}, {left[0]:,} of {counted(total[0], 'document')}"


def _tell(what: str, taken: Taken, way_out: str, *, is_much: bool) -> None:
    rows = [(format_bytes(size), counted(documents, "document"), reason) for reason, (documents, size) in taken.items()]
    shown, more = rows[:SHOWN], len(rows) - SHOWN
    wide = [max(len(row[i]) for row in shown) for i in (0, 1)]
    lines = [f"  {row[0]:>{wide[0]}}  {row[1]:>{wide[1]}}  {row[2]}" for row in shown]
    lines += [f"  and {more:,} more"] if more > 0 else []
    (warn if is_much else note)("\n".join([f"{what}:", *lines, *([f"  {way_out}"] if is_much else [])]))
