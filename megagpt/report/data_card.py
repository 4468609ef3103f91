"""The data card of a report: what the datasets of the runs hold, where they are still there."""

from collections.abc import Sequence
from pathlib import Path

from megagpt.config.parsing import leaves
from megagpt.data.manifest import SPLITS, Manifest, read_manifest
from megagpt.errors import UserError
from megagpt.html_parts import Cell, note, section, table
from megagpt.report.run_record import RunReport


def data_card(runs: Sequence[RunReport]) -> str:
    """Return the section on the datasets that the runs' settings name, each once."""
    used: dict[str, list[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            if key.startswith("megagpt.data.") and key.endswith((".path", ".val")) and isinstance(value, str):
                used.setdefault(value, []).append(run.name)
    parts = []
    for path, names in used.items():
        by = f", of {', '.join(dict.fromkeys(names))}" if len(runs) > 1 else ""
        try:
            manifest = read_manifest(Path(path))
        except (UserError, OSError):
            parts.append(note(f"{path}{by}: not here now, or no dataset, so only its name is known."))
            continue
        parts.append(_card(f"{path}{by}", manifest))
        parts += [
            note(f"{run.name} read another dataset, which was at this place then.", "warning")
            for run in runs
            if run.name in names and _was_another(run, manifest)
        ]
    return section("Data", *(parts or [note("There is no run.json, which names the datasets.")]))


def _was_another(run: RunReport, manifest: Manifest) -> bool:
    """Tell whether the newest checkpoint knows none of the run's datasets by this fingerprint."""
    if run.newest is None:
        return False
    known = {source.fingerprint for source in run.newest.mixture.sources}
    return manifest.fingerprint not in known | set(leaves(run.newest.identity.data).values())


def _card(title: str, manifest: Manifest) -> str:
    splits: list[list[Cell]] = [
        [name, split.documents, split.tokens, split.bytes]
        for name in SPLITS
        if (split := manifest.splits.get(name)) is not None
    ]
    sources: list[list[Cell]] = [[one.name, one.files, one.documents, one.bytes] for one in manifest.sources]
    tokenizer = manifest.tokenizer
    about = (
        f"{title}: tokenizer {tokenizer.type} with {tokenizer.vocab_size:,} pieces, built {manifest.created}, "
        f"fingerprint {manifest.fingerprint[:16]}."
    )
    return (
        note(about)
        + table(["split", "documents", "tokens", "bytes"], splits)
        + table(["source", "files", "documents", "bytes"], sources)
    )
