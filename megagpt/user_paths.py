"""Paths as users write them in a run file or on a command line, where no shell has expanded `~` and `$SCRATCH`."""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from megagpt.errors import UserError

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expanded(text: str) -> str:
    """Expand a leading `~` and variables of the environment. Raises UserError for one that is not set.

    A path that exists as it is written stays as it is, and so does a URL.
    """
    if "://" in text or os.path.lexists(text):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"path {text!r}: the home folder of {text.split('/')[0]} is not known; write the path in full")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise UserError(f"path {text!r}: the variable {name} is not set; export {name}, or write the path in full")
        return os.environ[name]

    return VARIABLE.sub(value, path)


def local_path(text: str) -> str:
    """Expand a path on this machine. Raises UserError for a URL, which would become a folder named `s3:`."""
    if "://" in text:
        raise UserError(
            f"path {text!r} is a URL, and only the inputs of data_tools may be one; give a path on this host"
        )
    return expanded(text)


def user_path(text: str) -> Path:
    """Read a path on a command line; argparse prints the error."""
    try:
        return Path(local_path(text))
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


def user_url_or_path(text: str) -> str:
    """Read a path or a URL on a command line."""
    try:
        return expanded(text)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


def similar_path(path: Path, fits: Callable[[Path], bool]) -> Path | None:
    """Return what is next to a path that does not exist, if it fits and its name, or its folder's, is nearly that."""
    if not path.parent.is_dir():
        folder = path.parent != path and similar_path(path.parent, lambda other: fits(other / path.name))
        return folder / path.name if folder else None
    try:
        names = [other.name for other in path.parent.iterdir() if fits(other)]
    except OSError:
        return None
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return path.parent / near[0] if near else None
