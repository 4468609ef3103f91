"""The report of a build as one HTML page without external files: plots, and tables of the same figures.

Names of sources and files may contain anything, so every text is escaped by `_text`.
"""

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data_tools.formatting import format_bytes, format_share
from data_tools.report.plots import COLORS, Series, bars, columns, printable, without_middle
from megagpt.data.manifest import SPLITS

FLOW = ("read", "after rules", "after deduplication", *SPLITS)
MOST_RULES = 30  # in a plot; the table shows all
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccc }
p { max-width: 46rem } .note { color: #666; margin: .3rem 0 }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0 } dt { color: #666 }
dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem }
figure { margin: .5rem 0; break-inside: avoid } figcaption { font-weight: 600 }
svg { max-width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; max-width: 9rem; overflow-wrap: break-word }
tr > .name { text-align: left; white-space: normal; overflow-wrap: anywhere }
tr > .name { min-width: 9rem } tr.total { font-weight: 600 }
@media print { body { margin: 0; font-size: 11px } .scroll { overflow: visible } tr { break-inside: avoid }
  h2 { break-after: avoid } th, td { padding: .1rem .4rem } }
"""

Report = dict[str, Any]  # what summary.make_report returns
Cell = str | int | float | None


def page_of(report: Report, title: str) -> str:
    """Return the page as HTML. Equal reports give equal pages."""
    sections = [_flow(report), _lengths(report), _tokens_per_byte(report), _rules(report), _cleaned(report)]
    sections += [_variants(report), _seconds(report), _skipped(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{_note('What the build read, dropped and wrote.')}{_totals(report)}\n"
        f"{''.join(map(_note, report['notes']))}"
        f"{''.join(sections)}</body>\n</html>\n"
    )


def _totals(report: Report) -> str:
    facts = {
        "documents": f"{report['documents']:,}",
        "text": format_bytes(report["bytes"]),
        "tokens": f"{report['tokens']:,}",
        "bytes per token": f"{report['bytes_per_token']:.2f}",
        **{f"{split} tokens": f"{report['splits'][split]['tokens']:,}" for split in SPLITS},
        "left out": f"{_documents_in(report['rejected']) + _documents_in(report['dropped']):,}",
        **({"text that the tokenizer loses": format_share(lost["share"])} if (lost := report["lost_text"]) else {}),
        "records skipped": f"{_documents_in(report['skipped']):,}",
        "built in": f"{sum(report['seconds'].values()):,.1f} s",
    }
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{_text(fact)}</dd></div>' for name, fact in facts.items())}</dl>"


def _flow(report: Report) -> str:
    sources = report["sources"]
    plots = [
        _figure(f"{unit.capitalize()} at each stage", bars(unit, FLOW, _series(sources, _at_each_stage(unit)), shown))
        for unit, shown in (("documents", _whole), ("bytes", format_bytes))
    ]
    tables = []
    for unit, shown in (("documents", _whole), ("bytes", format_bytes)):
        rows = [[source["name"], *map(shown, _at_each_stage(unit)(source))] for source in sources]
        total = [sum(column) for column in zip(*map(_at_each_stage(unit), sources), strict=True)]
        tables.append(_table([unit, *FLOW], rows, total=["all", *map(shown, total)] if len(sources) > 1 else None))
    note = "Read counts what the rules saw; records that could not be read are at the end of this page."
    return _section("In and out", _note(note), _plots(plots), *tables)


def _at_each_stage(unit: str) -> Callable[[Report], list[int]]:
    """Return a function of a source: its count at each stage of FLOW."""

    def counts(source: Report) -> list[int]:
        splits = [source["splits"][split][unit] for split in SPLITS]
        return [source["read"][unit], source["after_rules"][unit], sum(splits), *splits]

    return counts


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
        plots.append(_figure(f"Documents by their length in {unit}, {when}", columns(key, edges, counts)))
        rows: list[list[Cell]] = [
            [f"{2 ** (k - 1):,} to {2**k - 1:,}", *(values[i] for values in counts.values())]
            for i, k in enumerate(lengths)
        ]
        tables.append(_table([f"{unit} per document", *(without_middle(name, 30) for name in counts)], rows))
    return _section("Lengths of documents", _plots(plots), _plots(tables))


def _tokens_per_byte(report: Report) -> str:
    sums = [(source["name"], *_written(source)) for source in report["sources"]]
    ratios = {name: tokens / size for name, size, tokens in sums if size}
    plot = bars("tokens per byte", list(ratios), {"": list(ratios.values())}, lambda value: f"{value:.3f}")
    rows: list[list[Cell]] = [
        [name, size, tokens, f"{tokens / size:.4f}" if size else None, f"{size / tokens:.3f}" if tokens else None]
        for name, size, tokens in sums
    ]
    head = ["source", "bytes", "tokens", "tokens per byte", "bytes per token"]
    return _section("Tokens per byte", _figure("Tokens per byte of each source", plot), _table(head, rows))


def _rules(report: Report) -> str:
    found = [
        (source["name"], how, rule, counts)
        for source in report["sources"]
        for how, key in (("by a rule", "rejected"), ("afterwards", "dropped"))
        for rule, counts in source[key].items()
    ]
    if not found:
        return _section("What was left out", _note("Nothing: every document that was read is in a split."))
    total = [(rule, key, n["documents"]) for key in ("rejected", "dropped") for rule, n in report[key].items()]
    most = sorted(total, key=lambda row: (-row[2], row[0]))[:MOST_RULES]
    series = {
        "by a rule": [n if key == "rejected" else 0 for _, key, n in most],
        "afterwards: duplicates, contamination": [n if key == "dropped" else 0 for _, key, n in most],
    }
    plot = bars("rules", [rule for rule, _, _ in most], series, _whole)
    rows: list[list[Cell]] = [
        [source, rule, how, counts["documents"], format_bytes(counts["bytes"])] for source, how, rule, counts in found
    ]
    return _section(
        "What was left out",
        _note("The documents are in the folder rejects/, each with the rule that rejected it."),
        _figure("Documents left out, by what decided it", plot),
        _table(["source", "why", "when", "documents", "text"], rows, names=3),
    )


def _cleaned(report: Report) -> str:
    rows: list[list[Cell]] = [
        [source["name"], step, n] for source in report["sources"] for step, n in sorted(source["cleaned"].items())
    ]
    if not rows:
        return ""
    return _section("What cleaning changed", _table(["source", "step", "documents changed"], rows, names=2))


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
    return _section(
        "Tokenizations of the training split",
        _figure("Tokens, times the canonical tokenization's", plot),
        _table(["tokenization", "tokens", "times canonical"], rows),
    )


def _seconds(report: Report) -> str:
    seconds = report["seconds"]
    plot = bars("seconds", list(seconds), {"": list(seconds.values())}, lambda value: f"{value:,.3g} s")
    rows: list[list[Cell]] = [[stage, f"{spent:,.2f}"] for stage, spent in seconds.items()]
    return _section(
        "Time",
        _note("Since the build was last started: work finished before is not counted."),
        _figure("Seconds in each stage", plot),
        _table(["stage", "seconds"], rows, total=["all", f"{sum(seconds.values()):,.2f}"]),
    )


def _skipped(report: Report) -> str:
    rows: list[list[Cell]] = [
        [source["name"], reason, skipped["documents"], skipped["first"]]
        for source in report["sources"]
        for reason, skipped in source["skipped"].items()
    ]
    rows += [
        [source["name"], "unreadable file", None, why]
        for source in report["sources"]
        for why in source["unreadable"].values()
    ]
    if not rows:
        return _section("Records that could not be read", _note("None."))
    table = _table(["source", "why", "records", "the first"], rows, names=2, last_is_name=True)
    return _section("Records that could not be read", table)


def _series(sources: Sequence[Report], values: Callable[[Report], list[int]]) -> Series:
    """values(source) of each source by name, largest first; sources beyond the number of colors are added up."""
    ordered = sorted(sources, key=lambda source: -source["read"]["bytes"])
    own = ordered if len(ordered) <= len(COLORS) else ordered[: len(COLORS) - 1]
    series = {source["name"]: values(source) for source in own}
    if others := ordered[len(own) :]:
        series[f"{len(others)} other sources"] = [sum(column) for column in zip(*map(values, others), strict=True)]
    return series


def _written(source: Report) -> tuple[int, int]:
    """Return (bytes, tokens) of a source's documents in all splits."""
    size, tokens = (sum(source["splits"][split][unit] for split in SPLITS) for unit in ("bytes", "tokens"))
    return size, tokens


def _documents_in(counts: dict[str, dict[str, int]]) -> int:
    return sum(one["documents"] for one in counts.values())


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{''.join(parts)}</section>\n"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>\n'


def _plots(parts: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(parts)}</div>\n'


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>\n{svg}</figure>\n"


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    names: int = 1,
    last_is_name: bool = False,
    total: Sequence[Cell] | None = None,
) -> str:
    """Return an HTML table. The first `names` columns hold names, the others figures; `total` is a last row."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        is_name = [i < names or (last_is_name and i == len(cells) - 1) for i in range(len(cells))]
        return "".join(
            f"<{tag}{' class=name' if named else ''}>{_text(_shown(cell))}</{tag}>"
            for cell, named in zip(cells, is_name, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    if total is not None:
        body += f'<tr class="total">{line("td", total)}</tr>\n'
    return (
        f'<div class="scroll"><table>\n<thead><tr>{line("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:,}"


def _whole(value: float) -> str:
    """Return a count; empty for a fraction, so that axes of counts have no ticks at fractions."""
    return f"{value:,.0f}" if value == int(value) else ""


def _binary(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.0f} TiB"


def _text(text: str) -> str:
    return html.escape(printable(text))
