"""The finished files of a build, from the tasks that made them to where they belong; only the manifest comes later."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_tools.executor.tasks import Done, file_of
from data_tools.stages.pipeline import Stages
from data_tools.stages.shuffle import PROVENANCE, SHARD
from data_tools.storage.rejects import REJECTS
from data_tools.storage.shard_writer import write_index
from megagpt.atomic_files import fsync, sha256_of, write_atomically
from megagpt.data.manifest import SPLITS
from megagpt.data.provenance import FOLDER, provenance_path
from megagpt.data.shard_format import INDEX, REPORT, TOKENIZER_MODEL

REJECTS_DIR, REPORT_PAGE = "rejects", "report.html"
PUBLISHED = (*SPLITS, FOLDER, REJECTS_DIR, TOKENIZER_MODEL, INDEX, REPORT, REPORT_PAGE)


def publish(folder: Path, stages: Stages, report: dict[str, Any]) -> tuple[dict[str, str], str]:
    """(sha256 of every file that the manifest names under other_files, the index's sha256)."""
    for name in PUBLISHED:  # of a build that was killed right here
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    other_files: dict[str, str] = {}
    _place(stages.model, folder / TOKENIZER_MODEL)
    rows: list[dict[str, Any]] = []
    for header, done in stages.shards:
        _place(file_of(done.prefix, SHARD), folder / header.path)
        if header.variant == 0:  # another tokenization has its documents in the same order
            name = provenance_path(header.path)
            _place(file_of(done.prefix, PROVENANCE), folder / name)
            other_files[name] = done.result["provenance_sha256"]
        rows += done.result["index"]
    for stage, units in (("read", stages.texts), ("dropped", stages.tokens)):
        for number, done in enumerate(units):
            if _has_rejects(done):
                name = f"{REJECTS_DIR}/{stage}-{number:06d}.jsonl.zst"
                _place(file_of(done.prefix, REJECTS), folder / name)
                other_files[name] = sha256_of(folder / name)
    _write_report(folder, report)
    other_files[REPORT_PAGE] = sha256_of(folder / REPORT_PAGE)
    return other_files, write_index(folder / INDEX, rows)


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    from data_tools.report.html_page import page_of  # matplotlib takes too long to import for those who ask for --help

    write_atomically(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    write_atomically(folder / REPORT_PAGE, page_of(report, folder.name).encode())


def _has_rejects(done: Done) -> bool:
    return bool(done.result.get("rejected") or done.result.get("dropped"))


def _place(source: Path, target: Path) -> None:
    """Under a second name where the file system can, so that a build that is killed now loses nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync(target)
    fsync(target.parent)
