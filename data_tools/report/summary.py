"""Report what a build did: the figures for report.json and the HTML page, and a few lines for the terminal."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.config import BuildConfig, SourceConfig
from data_tools.formatting import format_bytes, format_share, shortened
from data_tools.report.examples import examples_kept, examples_left_out
from data_tools.report.settings import options_of, settings_of
from data_tools.stages.extract import unreadable_files
from data_tools.stages.pipeline import Stages
from data_tools.stages.what_is_left import share_of_bytes
from megagpt.data.manifest import SPLITS, Split
from megagpt.data.shard_format import REPORT
from megagpt.terminal import builder_command, counted, typed
from megagpt.tokenizer.tokenizer import Tokenizer

PROBE = " two  spaces,\ttab\r\nCaf\u00e9 \u6f22\u5b57 \U0001f600 \u2581 </s> \0"  # text that a tokenizer may lose

REPORT_PAGE = "report.html"
SHOWN_FILES = 5  # of those that could not be read
FAR = 2.0  # more than this times the share that was asked for, or less than that divided by it

Counts = dict[str, int]  # documents, bytes, and tokens where there are any


def make_report(
    stages: Stages, sources: Sequence[SourceConfig], config: BuildConfig, command: str = ""
) -> dict[str, Any]:
    """Return the content of report.json. `command` is what the user typed."""
    splits = {split: _counts(stages.count(split)) for split in SPLITS}
    total = {name: sum(counts[name] for counts in splits.values()) for name in ("documents", "bytes", "tokens")}
    own = [_describe_source(stages, number, source) for number, source in enumerate(sources)]
    return {
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "splits": splits,
        "sources": own,
        "unreadable": {path: why for source in own for path, why in source["unreadable"].items()},
        "skipped": _merge_skipped(source["skipped"] for source in own),
        "rejected": _sum_counts(source["rejected"] for source in own),
        "dropped": _sum_counts(source["dropped"] for source in own),
        "variants": _describe_variants(stages),
        "lost_text": stages.lost_text,
        "notes": [*_notes(stages, config), *_notes_of_readers(stages)],
        "loses_text": not Tokenizer.load(stages.model).round_trips(PROBE),
        "settings": settings_of(config, sources, command),
        "examples": examples_left_out(stages),
        "seconds": {stage: round(spent, 2) for stage, spent in stages.seconds.items()},
    }


def _describe_source(stages: Stages, number: int, source: SourceConfig) -> dict[str, Any]:
    """Return one source's counts at each stage.

    Lengths are counted by powers of two: key 12 is 2,048 to 4,095 bytes.
    """
    mine = stages.units_of_sources[number]
    extracted = [stages.extracted[i].result for i in mine]
    tokenized = [stages.tokenized[i].result for i in mine]
    splits = {split: _counts(stages.count(split, source=number)) for split in SPLITS}
    n_tokens, n_bytes = (sum(counts[unit] for counts in splits.values()) for unit in ("tokens", "bytes"))
    return {
        "name": source.name,
        "files": len({slice_.file.path for i in mine for slice_ in stages.units[i].slices}),
        "unreadable": unreadable_files([stages.extracted[i] for i in mine]),
        "skipped": _merge_skipped(_as_skipped(result["skipped"]) for result in extracted),
        "read": _sum_pairs(result["read"] for result in extracted),
        "after_rules": _sum_pairs(result["kept"] for result in extracted),
        "rejected": _sum_counts(_as_counts(result["rejected"]) for result in extracted),
        "cleaned": dict(sum((Counter(result["cleaned"]) for result in extracted), Counter())),
        "dropped": _sum_counts(_as_counts(result["dropped"]) for result in tokenized),
        "splits": splits,
        "bytes_per_token": round(n_bytes / n_tokens, 4) if n_tokens else None,
        "bytes_log2": _histogram(result["lengths"] for result in extracted),
        "options": options_of(source),
        "examples": examples_kept(stages, number),
        "tokens_log2": _histogram(result["tokens_per_document"] for result in tokenized),
    }


def _describe_variants(stages: Stages) -> list[dict[str, Any]]:
    """Count the tokens of the training split in each tokenization, and how much longer the sampled ones are."""
    tokens = [stages.count("train", variant)[2] for variant in range(len(stages.variants))]
    return [{"id": i, "tokens": n, "times_canonical": round(n / (tokens[0] or 1), 4)} for i, n in enumerate(tokens)]


def _notes(stages: Stages, config: BuildConfig) -> Iterator[str]:
    """Yield what the user may not expect of the splits."""
    splits, (test, val, _) = stages.splits, stages.splits.given
    if stages.cut:
        wanted = {"val": splits.val_fraction, "test": splits.test_fraction}
        fractions = [f"{name}_fraction={share:g}" for name, share in wanted.items() if share]
        yield (
            f"too few documents for {' and '.join(fractions)}: {stages.cut:,} cut after a paragraph or line, with the "
            "last part held out"
        )
    held_out: list[tuple[Split, str, bool]] = [("val", "validation", val > test), ("test", "test", test > 0)]
    for split, what, is_given in held_out:
        if stages.count(split)[0] or not (is_given or splits.shares[split]):
            continue
        more = f"build from more text or with a larger {split}_fraction"
        yield f"the {what} split is empty: {'nothing of its files is left' if is_given else more}"
    if not any(splits.given):
        yield from _far_from_fractions(stages, config)
    if config.val_fraction and not splits.shares["val"] and val == test and splits.trains(len(stages.units)):
        yield (
            "the validation split is empty: every input has a split of its own, and none is val; give one by --val, or "
            'a source with "split": "val"'
        )


def _far_from_fractions(stages: Stages, config: BuildConfig) -> Iterator[str]:
    """Yield a line for each part held out that is far from its share: a few documents differ in length."""
    sizes = {split: stages.count(split)[1] for split in SPLITS}
    for split in ("val", "test"):
        wanted, share = stages.splits.shares[split], sizes[split] / sum(sizes.values())
        if wanted and share and not wanted / FAR <= share <= wanted * FAR:
            yield (
                f"{split} has {share:.2%} of the text, where {split}_fraction={wanted:g} asks for {wanted:.2%}: "
                f"short documents are held out whole, and there are few; choose files by --{split} FILE instead of "
                f"{split}_fraction, or draw other documents by seed={config.seed + 1}"
            )


def _notes_of_readers(stages: Stages) -> Iterator[str]:
    """Yield what the user may not expect of documents that are kept."""
    # a build that an older version began has results without notes
    notes = (_as_skipped(done.result.get("notes", {})) for done in stages.extracted)
    for note, noted in _merge_skipped(notes).items():
        yield f"{note}: {noted['documents']:,} (first: {noted['first']})"


def _merge_skipped(many: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Add up the skipped records of each reason, and keep the place of the first."""
    merged: dict[str, dict[str, Any]] = {}
    for reasons in many:
        for reason, skipped in reasons.items():
            merged.setdefault(reason, skipped | {"documents": 0})["documents"] += skipped["documents"]
    return dict(sorted(merged.items()))


def _as_skipped(pairs: dict[str, tuple[int, str]]) -> dict[str, dict[str, Any]]:
    return {reason: {"documents": documents, "first": first} for reason, (documents, first) in pairs.items()}


def _counts(row: tuple[int, int, int]) -> Counts:
    return dict(zip(("documents", "bytes", "tokens"), row, strict=True))


def _as_counts(pairs: dict[str, list[int]]) -> dict[str, Counts]:
    return {rule: {"documents": documents, "bytes": size} for rule, (documents, size) in pairs.items()}


def _sum_pairs(pairs: Iterable[Sequence[int]]) -> Counts:
    both = list(pairs)
    return {"documents": sum(documents for documents, _ in both), "bytes": sum(size for _, size in both)}


def _sum_counts(many: Iterable[dict[str, Counts]]) -> dict[str, Counts]:
    total: dict[str, Counts] = {}
    for rules in many:
        for rule, counts in rules.items():
            own = total.setdefault(rule, {"documents": 0, "bytes": 0})
            own["documents"] += counts["documents"]
            own["bytes"] += counts["bytes"]
    # what took most bytes first
    return dict(sorted(total.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def _histogram(many: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = sum((Counter(one) for one in many), Counter())
    return {bits: total[bits] for bits in sorted(total, key=int)}


def summary(report: dict[str, Any], out: Path) -> str:
    """Return what the `build` command prints at its end."""
    read, kept = sum(source["read"]["bytes"] for source in report["sources"]), report["bytes"]
    text = f"{format_bytes(kept)} of text" if kept == read else f"{share_of_bytes(kept, read)} kept"
    lines = [
        f"{counted(report['documents'], 'document')}, {text} -> {report['tokens']:,} tokens "
        f"({report['bytes_per_token']:.2f} bytes per token) in {sum(report['seconds'].values()):.1f} s"
    ]
    if 2 * kept < read:
        lines.append(f"  less than half is kept: {out / REPORT_PAGE} shows what was left out, with examples")
    for split, count in report["splits"].items():
        if count["documents"]:
            lines.append(f"  {split:5}  {counted(count['documents'], 'document')}, {count['tokens']:,} tokens")
    lines += [f"  {note}" for note in report["notes"]]
    for variant in report["variants"][1:]:
        lines.append(f"  variant {variant['id']}: {variant['tokens']:,} tokens, {variant['times_canonical']:.2f} times")
    if report["lost_text"] and report["lost_text"]["share"]:
        share = format_share(report["lost_text"]["share"])
        lines.append(f"  the tokenizer loses {share} of the text: bits per byte do not compare with other tokenizers'")
    elif report["loses_text"]:
        lines.append("  the tokenizer may lose text that was not measured: spaces or letters that do not come back")
    for reason, skipped in report["skipped"].items():
        lines.append(f"  skipped {skipped['documents']:,}: {reason} (first: {skipped['first']})")
    for how in ("rejected", "dropped"):
        for rule, counts in report[how].items():
            lines.append(
                f"  {how} {format_bytes(counts['bytes'])} in {counted(counts['documents'], 'document')}: {rule}"
            )
    if unreadable := list(report["unreadable"].values()):
        n = len(unreadable)
        lines.append(f"  {n:,} {'files' if n > 1 else 'file'} could not be read, or not to the end (exit code 3):")
        lines += [f"    {shortened(why, 500)}" for why in unreadable[:SHOWN_FILES]]
        lines += [f"    and {n - SHOWN_FILES:,} more: {out / REPORT} names all"] if n > SHOWN_FILES else []
    lines.append(f"{out} is ready; {out / REPORT_PAGE} shows what is in it")
    lines.append(f"look inside with: {builder_command()} inspect {typed(out)} --documents 1")
    return "\n".join(lines)
