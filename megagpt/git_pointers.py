"""Recognize what Git keeps in place of a large file that was not fetched, so that it is not taken for the file."""

import shlex
from pathlib import Path

MOST_POINTER = 1024  # bytes
POINTERS = (  # name, how the file starts, the command that fetches the files
    ("Git LFS", (b"version https://git-lfs.", b"version https://hawser.", b"version http://git-media."), "lfs pull"),
    ("git-annex", (b"/annex/objects/",), "annex get ."),
)


def pointer_instead_of(path: str, start: bytes) -> str | None:
    """Return the message for a file that is a pointer, told by its first bytes; None for any other."""
    for kind, starts, command in POINTERS:
        if start.startswith(starts):
            where = "" if "://" in path else f" -C {shlex.quote(str(Path(path).parent))}"
            return f"{path} is a {kind} pointer, not the file itself; fetch the files with: git{where} {command}"
    return None
