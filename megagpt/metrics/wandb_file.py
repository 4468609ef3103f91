"""Find out which steps Weights & Biases has of an offline run: it loses the newest ones when a start is killed.

An offline run's file is a log in LevelDB's format behind 7 bytes: blocks of 32 KiB, in which each piece of a record has
a checksum (4 bytes), its length (2), its kind (1: whole, 2: first, 3: middle, 4: last) and its bytes.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32768, 7


def last_offline_step(folder: Path, run_id: str) -> int | None:
    """Return the last step of a run in the offline files of its starts; None if there are no files."""
    files = list(folder.glob(f"offline-run-*-{run_id}/*.wandb"))
    return max((int(row["_step"]) for file in files for row in offline_rows(file)), default=0) if files else None


def offline_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of history in an offline run's file."""
    read = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    for record in _records(file.read_bytes()):
        items = read(record).history.item
        if items:
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    at, record = HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:  # no room for a piece: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + HEAD + length > len(data) or kind == 0:  # cut short
            return
        record = (b"" if kind in (1, 2) else record) + data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):
            yield record
