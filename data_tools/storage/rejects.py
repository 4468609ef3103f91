"""Write rejected documents, each with the rule that rejected it, as zstd-compressed JSON lines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from megagpt.atomic_files import written

REJECTS = ".rejects.jsonl.zst"  # suffix of a task's file


class RejectWriter:
    """Counts and writes rejected documents by rule."""

    def __init__(self, sink: pa.CompressedOutputStream) -> None:
        self._sink = sink
        self.documents: dict[str, list[int]] = {}  # rule -> documents, bytes

    def count(self, rule: str, documents: int, size: int) -> None:
        counts = self.documents.setdefault(rule, [0, 0])
        counts[0] += documents
        counts[1] += size

    def write(self, rule: str, text: str, **where: Any) -> None:
        """Write a document, or the next piece of a long one; `where` is what tells its place in the input."""
        line = json.dumps({"rule": rule, **where, "text": text}, ensure_ascii=False) + "\n"
        self._sink.write(line.encode(errors="backslashreplace"))


@contextmanager
def open_rejects(path: Path) -> Iterator[RejectWriter]:
    """Open a writer of the file, which gets its name when the block ends without an error, also if it is empty."""
    with (
        written(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.CompressedOutputStream(file, "zstd") as sink,
    ):
        yield RejectWriter(sink)
