"""Write files so that a crash leaves each whole or absent; hash them, and check paths that come from outside."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file of which a crash leaves the old content or all of the new. Only one process may write to `path`."""
    # A fixed name, so that what a crash leaves behind is overwritten by the next write.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    make_durable(temporary, path)


def append_whole(path: Path, data: bytes) -> None:
    """Append all of the data or, if the disk takes no more, nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends without an error, the file gets its name.

    The temporary name is unique, so several processes may make the same file at the same time.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        make_durable(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name next to `path` that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def make_durable(temporary: Path, path: Path) -> None:
    """Rename a written file once its bytes are on the disk, and wait until the new name is on the disk too."""
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leads_out(folder: Path, relative: str) -> bool:
    """Tell whether a relative path that was read from a file is unsafe: odd characters, or a link out of the folder."""
    parts = relative.split("/")
    if not all(SAFE_NAME.fullmatch(part) and set(part) != {"."} for part in parts):
        return True
    # Only a link can lead out of the folder. Looking for one is ten times as fast as resolving the path of each shard.
    below = str(folder)
    for part in parts:
        below = f"{below}/{part}"
        if os.path.islink(below):
            return not (folder / relative).resolve().is_relative_to(folder.resolve())
    return False
