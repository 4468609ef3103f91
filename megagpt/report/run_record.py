"""Read what a run's folder tells of it, also while it trains: settings, metrics, samples, starts, roll-backs."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint.commit import COMMIT, Saved, best, newest_record, run_of
from megagpt.data.manifest import MANIFEST
from megagpt.errors import UserError
from megagpt.file_lock import LOCK
from megagpt.metrics.metrics_file import METRICS, SAMPLES, Row, read_rows
from megagpt.terminal import typed
from megagpt.train.run_log import LOG
from megagpt.user_paths import similar_path

SETTINGS = "run.json"
GIVE = "give a run's folder, its megagpt.out_dir"
LARGEST = 1e100  # a larger number is no metric, and would overflow in a plot
HEADER = re.compile(r"--- (?P<time>.+?): (?P<command>.*) \((?P<where>megagpt .*)\)")
RESUMED = re.compile(r"resuming from .*step_(\d+)")
ROLLED_BACK = re.compile(r"rolled back from step (\d+) to .*step_(\d+)")


@dataclass(frozen=True)
class Start:
    """One start of a run, as its log tells."""

    time: str
    command: str
    where: str  # version, host, process and number of ranks
    step: int  # that it resumed from


@dataclass(frozen=True)
class RollBack:
    """A return to a checkpoint after a spike."""

    from_step: int
    to_step: int


@dataclass(frozen=True)
class RunReport:
    """All that the page shows of a run."""

    path: Path
    name: str  # by which the page tells it from the others
    settings: dict[str, Any]  # dotted key -> value; empty if there is no run.json
    rows: list[Row]
    samples: list[Row]
    starts: list[Start]
    roll_backs: list[RollBack]
    opening: list[str]  # what the newest start printed of sizes and devices
    record: dict[str, Any]  # starts.json
    newest: Saved | None
    best_step: int | None

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    def steps_with(self, name: str) -> list[int]:
        """Return the steps whose rows have this metric."""
        return [row["step"] for row in self.rows if name in row]


def read_runs(paths: list[Path]) -> list[RunReport]:
    """Read several runs; one that is given twice is read once. Raises UserError for a folder that is no run."""
    distinct = {os.path.realpath(path): path for path in paths}  # Path.resolve raises for a link to itself
    names = [os.path.basename(real) for real in distinct]
    if len(set(names)) < len(names):
        above = os.path.commonpath([os.path.dirname(real) for real in distinct])
        names = [os.path.relpath(real, above) for real in distinct]
    return [read_run(path, name) for path, name in zip(distinct.values(), names, strict=True)]


def read_run(path: Path, name: str) -> RunReport:
    """Read one run. Raises UserError if the folder is no run or its run file is damaged."""
    if not _is_run(path):
        raise UserError(_no_run(path))
    newest = None
    with suppress(UserError):  # of another format: the page shows the rest
        newest = newest_record(path)
    starts, roll_backs, opening = read_log(path / LOG)
    named = best(path)
    return RunReport(
        path=path,
        name=name,
        settings=dict(_flat(_read_settings(path / SETTINGS))),
        rows=_drawable(read_rows(path / METRICS)),
        samples=[row for row in read_rows(path / SAMPLES) if _is_sample(row)],
        starts=starts,
        roll_backs=roll_backs,
        opening=opening,
        record=_read_record(path / "starts.json"),
        newest=newest,
        best_step=int(named.name.removeprefix("step_")) if named else None,
    )


def read_log(file: Path) -> tuple[list[Start], list[RollBack], list[str]]:
    """Return the starts and roll-backs in train.log, and the lines that the newest start began with."""
    starts: list[Start] = []
    roll_backs: list[RollBack] = []
    opening: list[str] = []
    is_opening = False
    for line in _lines(file):
        if found := HEADER.fullmatch(line):
            starts.append(Start(**found.groupdict(), step=0))
            opening, is_opening = [], True
        elif found := RESUMED.fullmatch(line):
            if starts:
                starts[-1] = Start(**{**vars(starts[-1]), "step": int(found[1])})
            is_opening = False
        elif found := ROLLED_BACK.match(line):
            roll_backs.append(RollBack(int(found[1]), int(found[2])))
        elif line.startswith(("no checkpoint in ", "step ")):
            is_opening = False
        elif is_opening:
            opening.append(line)
    return starts, roll_backs, opening


def _lines(file: Path) -> Iterator[str]:
    if file.is_file():
        with file.open(errors="replace") as text:
            yield from (line.rstrip("\n") for line in text)


def _is_run(path: Path) -> bool:
    """Tell whether a run logged here, or has just begun. A checkpoint, or a user's own folder, has a run file, too."""
    if (path / METRICS).is_file():
        return True
    began = any((path / name).exists() for name in ("starts.json", LOCK, "checkpoints"))
    return began and (path / SETTINGS).is_file() and not (path / COMMIT).is_file()


def _no_run(path: Path) -> str:
    if not path.exists():
        near = similar_path(path, _is_run)
        return f"there is no run {path}; {f'did you mean {near}?' if near else GIVE}"
    for above in (run_of(path), path.parent):
        if (above / METRICS).is_file():
            return f"{path} is part of a run; give the run's folder: megagpt report {typed(above)}"
    what = "is a file, and no run" if path.is_file() else f"is no run: it has no {METRICS}"
    if (path / MANIFEST).is_file():
        what = "is a dataset, and no run"
    below = sorted(file.parent for file in path.glob(f"*/{METRICS}")) if path.is_dir() else []
    shown = " ".join(typed(run) for run in below[:5])
    runs = f"the runs in it: megagpt report {shown}" if below else "a run's folder, its megagpt.out_dir"
    return f"{path} {what}; give {runs}"


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(_damaged(file, str(error))) from error
    if not isinstance(settings, dict):
        raise UserError(_damaged(file, "it is no JSON object"))
    return settings


def _damaged(file: Path, why: str) -> str:
    return f"run file {file} is damaged ({why}); copy {SETTINGS} of one of the run's checkpoints over it, or delete it"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a run file as an override names them, with their values; an empty section is a value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not parts:
        yield path, value
    for key, inner in parts:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))


def _drawable(rows: list[Row]) -> list[Row]:
    """Return rows of numbers that a plot has room for; those that are not finite or too large are None."""
    numbers = [{name: _number(value) for name, value in row.items() if _is_metric(value)} for row in rows]
    return [row for row in numbers if row.get("step") is not None]


def _is_metric(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _number(value: float | None) -> float | None:
    return value if value is not None and -LARGEST < value < LARGEST else None


def _is_sample(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("continuation"), str)


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
