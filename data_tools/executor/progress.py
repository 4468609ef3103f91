"""The interface through which tasks are run, and the progress bar that shows how many are done."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

Arguments = Sequence[tuple[Any, ...]]
RunAll = Callable[[Callable[..., Any], Arguments, str], list[Any]]
"""run_all(task, arguments, what): task(*arguments[i]) for every i, in any order; the results in order."""


def warn(text: str) -> None:
    """Print a warning at once, above the progress bars."""
    note(f"warning: {text}")


def note(text: str) -> None:
    """Print a line on standard error at once, above the progress bars."""
    tqdm.write(text, file=sys.stderr)


def progress(items: Any, total: int, what: str) -> Any:
    """Iterate with a progress bar, if standard error is a terminal and it takes longer than two seconds."""
    return tqdm(items, total=total, desc=what, unit="task", delay=2, mininterval=0.5, disable=None)
