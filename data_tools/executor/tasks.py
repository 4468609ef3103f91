"""Run each task of a build once, so that a killed build resumes where it stopped.

A task is a function that writes files. They are named .build/FUNCTION/HASH..., where the hash covers everything that
decides what is in them. Last, the task's result is written to HASH.json; a build that is started again skips every
task that has this file.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from data_tools.executor.progress import Arguments, Progress
from megagpt.atomic_files import written
from megagpt.errors import UserError

VERSION = 1  # raise it when a task writes something else for the same arguments
LIBRARIES = (
    *("charset-normalizer", "fastwarc", "fasttext-numpy2-wheel", "ftfy", "numpy", "orjson", "pyarrow", "rensa"),
    *("resiliparse", "sentencepiece", "xxhash"),
)
LIST = ".list"
FULL = {ENOSPC, EDQUOT, EFBIG}

Result = dict[str, Any]  # small, and only of types that JSON has
Task = Callable[..., Result]
"""task(prefix, *arguments) writes files named by with_suffix(prefix, ...) and returns its result."""
RunAll = Callable[[Callable[..., Any], Arguments, Progress], list[Any]]
"""run_all(task, arguments, progress): task(*arguments[i]) for every i, in any order; the results in order."""


@dataclass(frozen=True)
class Done:
    """A finished task: its files begin with `prefix`."""

    prefix: Path
    result: Result

    @property
    def key(self) -> str:
        return self.prefix.name


def file_of(prefix: Path, suffix: str) -> Path:
    """Return one of a task's files."""
    return prefix.with_name(prefix.name + suffix)


def made_by() -> list[str]:
    """Return the versions of everything that a task's files may depend on besides its arguments."""
    return [f"data_tools {VERSION}", f"Unicode {unicodedata.unidata_version}", *map(_version_of, LIBRARIES)]


def _version_of(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"no {library}"


class Tasks:
    """Runs tasks that write below `folder`, in the processes behind `run_all`."""

    def __init__(self, folder: Path, run_all: RunAll) -> None:
        self.folder, self._run_all, self._made_by = folder, run_all, made_by()

    def run(
        self,
        task: Task,
        arguments: Sequence[tuple[Any, ...]],
        what: str,
        sizes: Sequence[int] | None = None,
        unit: str = "B",
    ) -> list[Done]:
        """Call task(prefix, *arguments[i]) for every i that is not done yet; returns all of them, in order.

        `what` names the work in the progress bar; sizes[i] is about what task i advances by, in `unit`.
        """
        stage = self.folder / task.__name__
        stage.mkdir(exist_ok=True)
        prefixes = [stage / self._key(task, args) for args in arguments]
        waiting = {prefix: i for i, prefix in enumerate(prefixes) if not _is_done(prefix)}
        counted: Sequence[int] = sizes or []
        if not sum(counted):
            counted, unit = [1] * len(prefixes), "task"
        left = [counted[i] for i in waiting.values()]
        progress = Progress(what, left, unit=unit, already=sum(counted) - sum(left))
        self._run_all(_run_one, [(task, prefix, arguments[i]) for prefix, i in waiting.items()], progress)
        return [Done(prefix, json.loads(file_of(prefix, ".json").read_bytes())) for prefix in prefixes]

    def run_one(self, task: Task, *args: Any, what: str) -> Done:
        """Run one task, unless it is done."""
        [done] = self.run(task, [args], what)
        return done

    def _key(self, task: Task, args: tuple[Any, ...]) -> str:
        canonical = json.dumps([task.__name__, self._made_by, to_jsonable_python(self._by_name(args))], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def _by_name(self, arg: Any) -> Any:
        """Arguments with the paths of earlier tasks relative to the folder, so that the folder may be moved.

        The names of these paths are hashes, so they stand for the content.
        """
        if isinstance(arg, tuple | list):
            return [self._by_name(inner) for inner in arg]
        is_ours = isinstance(arg, Path) and arg.is_relative_to(self.folder)
        return str(arg.relative_to(self.folder)) if is_ours else arg


def write_list(prefix: Path, items: Sequence[Any]) -> Result:
    """Return a task that stores a long list once, for many other tasks to read by one path."""
    with written(file_of(prefix, LIST)) as temporary:
        temporary.write_bytes(json.dumps(items).encode())
    return {}


def read_list(prefix: Path) -> list[Any]:
    """Return the list that write_list stored."""
    items: list[Any] = json.loads(file_of(prefix, LIST).read_bytes())
    return items


def _is_done(prefix: Path) -> bool:
    return file_of(prefix, ".json").is_file()


def _run_one(task: Task, prefix: Path, args: tuple[Any, ...]) -> None:
    try:
        result = task(prefix, *args)
        with written(file_of(prefix, ".json")) as temporary:
            temporary.write_bytes(json.dumps(result).encode())
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"{prefix.parent} cannot be written: {error.strerror}; free disk space and run the same command again"
        ) from error
