"""Types of options: numbers within bounds, and lists that may also be given as one string on the command line."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from megagpt.user_paths import expanded


def _split(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""`a,b` or ["a", "b"]."""
Lines = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""`a` or ["a", "b"]: one string is not split, because a line of text or a pattern may contain a comma."""
Paths = Annotated[Lines, AfterValidator(lambda paths: tuple(map(expanded, paths)))]
"""Paths or URLs, in which `~` and variables are expanded."""
Count = Annotated[int, Field(ge=0, le=10**15)]
"""A number of words, lines or characters."""
Limit = Annotated[float, Field(ge=0.0, le=1e15)]
"""A share, or a ratio, which may exceed 1."""
