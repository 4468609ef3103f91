"""Options that are lists: `a,b` on the command line, `["a", "b"]` in a file, or one alone."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def _split(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""One is not split: a path may have a comma in it."""
Lines = Paths
"""Nor is text."""
