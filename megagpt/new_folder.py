"""Write a folder that appears once it is whole: an error, or a kill, leaves nothing under its name."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagpt.errors import UserError


def check_free(folder: Path) -> None:
    """Raise UserError unless the folder is new or empty."""
    if os.path.realpath(folder) == os.getcwd():
        raise UserError(f"{folder} is the current folder, which cannot be replaced; name a new folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} exists and is no folder; name another place")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and nothing in it is overwritten; name a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its name at the end; after an error it is removed.

    Raises UserError if it cannot be written.
    """
    check_free(folder)
    partial = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.absolute().parent))
        yield partial
        for path in (partial, *partial.iterdir()):  # others could read neither a temporary folder nor safetensors
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        partial.rename(folder)  # over an empty folder, too
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; free disk space, or name another place") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask
