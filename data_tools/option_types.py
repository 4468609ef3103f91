"""Types of options that are lists, which may also be given as one string on the command line."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def _split(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""`a,b` or ["a", "b"]."""
Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""`a` or ["a", "b"]: one string is not split, because a path may contain a comma."""
Lines = Paths
"""Lines of text or patterns, which may contain commas too."""
