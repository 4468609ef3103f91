"""Put the finished files of a build into the dataset folder. Only the manifest is written later, by build.py."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_tools.executor.tasks import Done, file_of
from data_tools.report.summary import REPORT_PAGE
from data_tools.stages.pipeline import Stages
from data_tools.stages.shuffle import PROVENANCE, SHARD
from data_tools.storage.rejects import REJECTS
from data_tools.storage.shard_writer import write_index
from megagpt.atomic_files import fsync, sha256_of, write_atomically
from megagpt.data.manifest import SPLITS
from megagpt.data.provenance import FOLDER, provenance_path
from megagpt.data.shard_format import INDEX, REPORT, TOKENIZER_MODEL

REJECTS_DIR = "rejects"
PUBLISHED = (*SPLITS, FOLDER, REJECTS_DIR, TOKENIZER_MODEL, INDEX, REPORT, REPORT_PAGE)


def publish(folder: Path, stages: Stages, report: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Link every file into `folder`; returns (name -> sha256 for the manifest's other_files, the index's sha256)."""
    # what is there is left over from a build that was killed while it published
    for name in PUBLISHED:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    other_files: dict[str, str] = {}
    _link_or_copy(stages.model, folder / TOKENIZER_MODEL)
    rows: list[dict[str, Any]] = []
    for header, done in stages.shards:
        _link_or_copy(file_of(done.prefix, SHARD), folder / header.path)
        # the other tokenizations have the same documents in the same order, so one provenance file is enough
        if header.variant == 0:
            name = provenance_path(header.path)
            _link_or_copy(file_of(done.prefix, PROVENANCE), folder / name)
            other_files[name] = done.result["provenance_sha256"]
        rows += done.result["index"]
    for stage, units in (("read", stages.extracted), ("dropped", stages.tokenized)):
        for number, done in enumerate(units):
            if _has_rejects(done):
                name = f"{REJECTS_DIR}/{stage}-{number:06d}.jsonl.zst"
                _link_or_copy(file_of(done.prefix, REJECTS), folder / name)
                other_files[name] = sha256_of(folder / name)
    _write_report(folder, report)
    other_files[REPORT_PAGE] = sha256_of(folder / REPORT_PAGE)
    return other_files, write_index(folder / INDEX, rows)


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    # imported here, because it imports matplotlib, and --help must be fast
    from data_tools.report.html_page import page_of

    write_atomically(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    write_atomically(folder / REPORT_PAGE, page_of(report, folder.name).encode())


def _has_rejects(done: Done) -> bool:
    return bool(done.result.get("rejected") or done.result.get("dropped"))


def _link_or_copy(source: Path, target: Path) -> None:
    """Link if the file system can: the task keeps its file, so a build that is killed now loses nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync(target)
    fsync(target.parent)
