"""Files that are whole or absent, and their hashes."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")


def write_atomically(path: Path, data: bytes) -> None:
    """After a crash there is either nothing new under this name or all of it. For files that one process writes."""
    temporary = path.with_name(path.name + ".tmp")  # which the next one overwrites
    temporary.write_bytes(data)
    make_durable(temporary, path)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to write to, which gets its name when the block ends well: whole, and on the disk.

    Its temporary name is nobody else's, so two processes that make the same file do not meet in it.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        make_durable(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def make_durable(temporary: Path, path: Path) -> None:
    """Give a written file its name, once its bytes are on the disk."""
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leads_out(folder: Path, relative: str) -> bool:
    """Whether a path that a file names ("/" between its parts) may lie outside of the folder, or is no plain name."""
    parts = relative.split("/")
    if not all(SAFE_NAME.fullmatch(part) and set(part) != {"."} for part in parts):
        return True
    below = str(folder)
    for part in parts:  # only a link can lead out, and looking for one is ten times as fast as to resolve each shard
        below = f"{below}/{part}"
        if os.path.islink(below):
            return not (folder / relative).resolve().is_relative_to(folder.resolve())
    return False
