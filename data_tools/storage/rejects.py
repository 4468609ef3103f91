"""Documents that were dropped, each with the rule that dropped it: zstd-compressed JSON lines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from megagpt.atomic_files import written

REJECTS = ".rejects.jsonl.zst"  # of a task that drops documents


class RejectWriter:
    def __init__(self, sink: pa.CompressedOutputStream) -> None:
        self._sink = sink
        self.documents: dict[str, list[int]] = {}  # rule -> documents, bytes

    def count(self, rule: str, documents: int, size: int) -> None:
        counts = self.documents.setdefault(rule, [0, 0])
        counts[0] += documents
        counts[1] += size

    def write(self, rule: str, text: str, **where: Any) -> None:
        """A document, or the next piece of a long one."""
        line = json.dumps({"rule": rule, **where, "text": text}, ensure_ascii=False) + "\n"
        self._sink.write(line.encode(errors="backslashreplace"))


@contextmanager
def open_rejects(path: Path) -> Iterator[RejectWriter]:
    """The file is there, whole, once the block ends; an empty one if nothing was dropped."""
    with (
        written(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.CompressedOutputStream(file, "zstd") as sink,
    ):
        yield RejectWriter(sink)
