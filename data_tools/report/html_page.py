"""The report of a build as one HTML page without external files: plots, tables of the same figures, and examples.

Sources are in the same order everywhere, the largest first, and rows of tables by what matters most in them. Names and
texts may contain anything; megagpt/html_parts.py escapes them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from data_tools.formatting import format_bytes, format_share
from data_tools.report.plots import Series, bars, columns
from data_tools.stages.what_is_left import share_of_bytes
from megagpt.data.manifest import SPLITS, Split
from megagpt.html_parts import (
    Cell,
    facts,
    figure,
    folded,
    note,
    page,
    quotation,
    section,
    side_by_side,
    table,
    without_middle,
)
from megagpt.svg_plots import COLORS

MOST_RULES = 30  # in a plot; the table shows all
RULE, LATER = "by a rule", "afterwards"

Report = dict[str, Any]  # what summary.make_report returns


def page_of(report: Report, title: str) -> str:
    """Return the page as HTML. Equal reports give equal pages."""
    largest_first = sorted(report["sources"], key=lambda source: -source["read"]["bytes"])
    report = report | {"sources": largest_first}
    parts = [note("What the build read, left out and wrote."), _totals(report), *map(note, report["notes"])]
    parts += [_flow(report), _rules(report), _examples(report), _lengths(report), _tokens_per_byte(report)]
    parts += [_cleaned(report), _variants(report), _settings(report), _seconds(report), _skipped(report)]
    return page(title, parts)


def _totals(report: Report) -> str:
    read = sum(source["read"]["bytes"] for source in report["sources"])
    shown = {
        "kept": share_of_bytes(report["bytes"], read),
        "documents": f"{report['documents']:,}",
        "tokens": f"{report['tokens']:,}",
        "bytes per token": f"{report['bytes_per_token']:.2f}",
        **{f"{split} tokens": f"{report['splits'][split]['tokens']:,}" for split in _used_splits(report)},
        "left out": f"{_documents_in(report['rejected']) + _documents_in(report['dropped']):,} documents",
        **({"text that the tokenizer loses": format_share(lost["share"])} if (lost := report["lost_text"]) else {}),
        **({"records skipped": f"{skipped:,}"} if (skipped := _documents_in(report["skipped"])) else {}),
        "built in": f"{sum(report['seconds'].values()):,.1f} s",
    }
    is_much = 2 * report["bytes"] < read
    warning = "Less than half of the text is kept: see what was left out, and whether it should be."
    return facts(shown) + (note(warning, "warning") if is_much else "")


def _used_splits(report: Report) -> list[Split]:
    """Return the splits that have documents, train in any case."""
    return [split for split in SPLITS if split == "train" or report["splits"][split]["documents"]]


def _flow(report: Report) -> str:
    sources, splits = report["sources"], _used_splits(report)
    flow = ["read", "after rules", "after deduplication", *splits]
    plots, tables = [], []
    for unit, shown in (("bytes", format_bytes), ("documents", _whole)):
        counts = _at_each_stage(unit, splits)
        plots.append(figure(f"{unit.capitalize()} at each stage", bars(unit, flow, _series(sources, counts), shown)))
        rows = [[source["name"], *map(shown, counts(source))] for source in sources]
        total = [sum(column) for column in zip(*map(counts, sources), strict=True)]
        tables.append(table([unit, *flow], rows, total=["all", *map(shown, total)] if len(sources) > 1 else None))
    read = "Read counts what the rules saw; records that could not be read are at the end of this page."
    return section("In and out", note(read), side_by_side(*plots, *tables))


def _at_each_stage(unit: str, splits: Sequence[Split]) -> Callable[[Report], list[int]]:
    """Return a function of a source: its count at each stage."""

    def counts(source: Report) -> list[int]:
        own = [source["splits"][split][unit] for split in splits]
        return [source["read"][unit], source["after_rules"][unit], sum(own), *own]

    return counts


def _rules(report: Report) -> str:
    ways = ((RULE, "rejected"), (LATER, "dropped"))
    found = [
        (source["name"], rule, how, counts)
        for source in report["sources"]
        for how, key in ways
        for rule, counts in source[key].items()
    ]
    if not found:
        return section("What was left out", note("Nothing: every document that was read is in a split."))
    found.sort(key=lambda row: -row[3]["bytes"])
    most = [(rule, key, counts) for _, key in ways for rule, counts in report[key].items()]
    most.sort(key=lambda row: (-row[2]["bytes"], row[0]))
    plots = []
    for unit, shown in (("bytes", format_bytes), ("documents", _whole)):
        series = {
            how: [counts[unit] if key == own else 0 for _, key, counts in most[:MOST_RULES]]
            for how, own in ((RULE, "rejected"), (f"{LATER}: copies, contamination", "dropped"))
        }
        plots.append(
            figure(
                f"{unit.capitalize()} left out, by what decided it",
                bars(f"rules {unit}", [rule for rule, *_ in most[:MOST_RULES]], series, shown),
            )
        )
    read = {source["name"]: source["read"]["bytes"] for source in report["sources"]}
    rows: list[list[Cell]] = [
        [
            *(source, rule, how),
            counts["documents"],
            format_bytes(counts["bytes"]),
            format_share(counts["bytes"] / max(read[source], 1)),
        ]
        for source, rule, how, counts in found
    ]
    head = ["source", "why", "when", "documents", "text", "share of the source"]
    return section(
        "What was left out",
        note("All of these documents are in the folder rejects/, each with the rule that rejected it."),
        side_by_side(*plots),
        table(head, rows, names=3),
    )


def _examples(report: Report) -> str:
    kept = [
        folded(f"kept: {source['name']}", *(quotation(one["where"], one["text"]) for one in own))
        for source in report["sources"]
        if (own := source["examples"])
    ]
    taken = {rule: counts for key in ("rejected", "dropped") for rule, counts in report[key].items()}
    left_out = [
        folded(
            f"left out: {rule} ({format_bytes(counts['bytes'])})",
            *(quotation(one["where"], one["text"]) for one in own),
        )
        for rule, counts in sorted(taken.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        if (own := report["examples"].get(rule))
    ]
    shown = [side_by_side("".join(left_out), "".join(kept))] if left_out else kept
    return section("Examples", note("The beginnings of the first documents; click to unfold."), *shown)


def _lengths(report: Report) -> str:
    plots, tables = [], []
    for key, unit, when, edge in (
        ("bytes_log2", "bytes", "after the rules", _binary),
        ("tokens_log2", "tokens", "as written, with the end-of-document token", _whole),
    ):
        bits = sorted({int(k) for source in report["sources"] for k in source[key]})
        if not bits:
            continue
        lengths = range(max(bits[0], 1), bits[-1] + 1)  # k: from 2^(k-1) to 2^k - 1
        counts = _series(report["sources"], lambda source: [source[key].get(str(k), 0) for k in lengths])  # noqa: B023
        edges = [edge(2.0 ** (k - 1)) for k in [*lengths, lengths[-1] + 1]]
        plots.append(figure(f"Documents by their length in {unit}, {when}", columns(key, edges, counts)))
        rows: list[list[Cell]] = [
            [f"{2 ** (k - 1):,} to {2**k - 1:,}", *(values[i] for values in counts.values())]
            for i, k in enumerate(lengths)
        ]
        tables.append(table([f"{unit} per document", *(without_middle(name, 30) for name in counts)], rows))
    return section("Lengths of documents", side_by_side(*plots, *tables))


def _tokens_per_byte(report: Report) -> str:
    sums = [(source["name"], *_written(source)) for source in report["sources"]]
    ratios = {name: tokens / size for name, size, tokens in sums if size}
    plot = bars("tokens per byte", list(ratios), {"": list(ratios.values())}, lambda value: f"{value:.3f}")
    rows: list[list[Cell]] = [
        [name, size, tokens, f"{tokens / size:.4f}" if size else None, f"{size / tokens:.3f}" if tokens else None]
        for name, size, tokens in sums
    ]
    head = ["source", "bytes", "tokens", "tokens per byte", "bytes per token"]
    shown = side_by_side(figure("Tokens per byte of each source", plot), table(head, rows))
    return section("Tokens per byte", shown)


def _cleaned(report: Report) -> str:
    rows: list[list[Cell]] = [
        [source["name"], step, n]
        for source in report["sources"]
        for step, n in sorted(source["cleaned"].items(), key=lambda item: (-item[1], item[0]))
    ]
    if not rows:
        return ""
    return section("What cleaning changed", table(["source", "step", "documents changed"], rows, names=2))


def _variants(report: Report) -> str:
    variants = report["variants"]
    if len(variants) < 2:
        return ""
    names = ["canonical" if variant["id"] == 0 else f"variant {variant['id']}" for variant in variants]
    times = [variant["times_canonical"] for variant in variants]
    plot = bars("variants", names, {"": times}, lambda value: f"{value:.2f}")
    rows: list[list[Cell]] = [
        [name, variant["tokens"], f"{variant['times_canonical']:.4f}"]
        for name, variant in zip(names, variants, strict=True)
    ]
    return section(
        "Tokenizations of the training split",
        side_by_side(
            figure("Tokens, times the canonical tokenization's", plot),
            table(["tokenization", "tokens", "times canonical"], rows),
        ),
    )


def _settings(report: Report) -> str:
    """Return how the dataset was built; sources that are read with the same options share a table."""
    settings = report["settings"]
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for source in report["sources"]:
        options = tuple(source["options"].items())
        groups.setdefault(options, []).append(source["name"])
    tables = [folded("all options", _options(settings["options"].items()), is_open=True)]
    tables += [folded(f"read with: {', '.join(names)}", _options(options)) for options, names in groups.items()]
    command = [quotation("", settings["command"])] if settings["command"] else []
    built = f"Built {settings['at']} with {settings['versions']}."
    return section("How it was built", note(built), *command, side_by_side(tables[0], "".join(tables[1:])))


def _options(options: Any) -> str:
    return table(["option", "value"], [[key, value] for key, value in options], names=2)


def _seconds(report: Report) -> str:
    seconds = report["seconds"]
    plot = bars("seconds", list(seconds), {"": list(seconds.values())}, lambda value: f"{value:,.3g} s")
    rows: list[list[Cell]] = [[stage, f"{spent:,.2f}"] for stage, spent in seconds.items()]
    total = ["all", f"{sum(seconds.values()):,.2f}"]
    return section(
        "Time",
        note("Since the build was last started: work finished before is not counted."),
        side_by_side(figure("Seconds in each stage", plot), table(["stage", "seconds"], rows, total=total)),
    )


def _skipped(report: Report) -> str:
    rows: list[list[Cell]] = [
        [source["name"], reason, skipped["documents"], skipped["first"]]
        for source in report["sources"]
        for reason, skipped in source["skipped"].items()
    ]
    rows.sort(key=lambda row: -int(row[2] or 0))
    rows += [
        [source["name"], "unreadable file", None, why]
        for source in report["sources"]
        for why in source["unreadable"].values()
    ]
    if not rows:
        return section("Records that could not be read", note("None."))
    shown = table(["source", "why", "records", "the first"], rows, names=2, last_is_name=True)
    return section("Records that could not be read", shown)


def _series(sources: Sequence[Report], values: Callable[[Report], list[int]]) -> Series:
    """values(source) of each source by name; sources beyond the number of colors are added up."""
    own = sources if len(sources) <= len(COLORS) else sources[: len(COLORS) - 1]
    series = {source["name"]: values(source) for source in own}
    if others := sources[len(own) :]:
        series[f"{len(others)} other sources"] = [sum(column) for column in zip(*map(values, others), strict=True)]
    return series


def _written(source: Report) -> tuple[int, int]:
    """Return (bytes, tokens) of a source's documents in all splits."""
    size, tokens = (sum(source["splits"][split][unit] for split in SPLITS) for unit in ("bytes", "tokens"))
    return size, tokens


def _documents_in(counts: dict[str, dict[str, int]]) -> int:
    return sum(one["documents"] for one in counts.values())


def _whole(value: float) -> str:
    """Return a count; empty for a fraction, so that axes of counts have no ticks at fractions."""
    return f"{value:,.0f}" if value == int(value) else ""


def _binary(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.0f} TiB"
