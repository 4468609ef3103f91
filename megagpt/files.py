"""Files that are whole or absent, and their hashes."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """After a crash there is either nothing new under this name or all of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    make_durable(temporary, path)


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
