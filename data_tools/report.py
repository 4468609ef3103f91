"""What a build did, as report.json for machines and as a few lines for a person."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.tokenization import Tally
from megagpt.data_manifest import SPLITS, SourceInfo


def make_report(tally: Tally, sources: Sequence[SourceInfo], seconds: dict[str, float]) -> dict[str, Any]:
    total = tally.total()
    return {
        **vars(total),
        "bytes_per_token": round(total.bytes / total.tokens, 4),
        "splits": {split: vars(tally.total(split=split)) for split in SPLITS},
        "sources": [
            {
                "name": source.name,
                "files": source.files,
                "splits": {split: vars(tally.total(source=number, split=split)) for split in SPLITS},
            }
            for number, source in enumerate(sources)
        ],
        "skipped": {
            reason: {"documents": n, "first": tally.first_skipped[reason]}
            for reason, n in sorted(tally.skipped.items())
        },
        "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
    }


def summary(report: dict[str, Any], out: Path) -> str:
    lines = [
        f"{report['documents']:,} documents, {human(report['bytes'])} of text -> {report['tokens']:,} tokens "
        f"({report['bytes_per_token']:.2f} bytes per token) in {sum(report['seconds'].values()):.1f} s"
    ]
    for split, count in report["splits"].items():
        if count["documents"]:
            lines.append(f"  {split:5}  {count['documents']:,} documents, {count['tokens']:,} tokens")
    if not report["splits"]["val"]["documents"]:
        lines.append("  val is empty: build from more documents or with a larger val_fraction")
    for reason, skipped in report["skipped"].items():
        lines.append(f"  skipped {skipped['documents']:,}: {reason} (first: {skipped['first']})")
    lines.append(f"{out} is ready; look inside with: python -m data_tools inspect {out} --documents 1")
    return "\n".join(lines)


def describe_skipped(tally: Tally) -> str:
    return "; ".join(f"{n} {reason} (first: {tally.first_skipped[reason]})" for reason, n in tally.skipped.items())


def human(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"
