"""Read a run file and the files that its key `extends` names, and merge them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config.mistakes import as_written
from megagpt.config.parsing import dotted_items, read_json
from megagpt.errors import UserError
from megagpt.user_paths import local_path

MANIFEST_KEYS = {"build_id", "splits", "tokenizer"}  # of a dataset, whose manifest some take for a run file
EXTENDS = "extends"


@dataclass(frozen=True)
class RunFile:
    """A run file's own object, without the key `extends`."""

    path: Path
    own: dict[str, Any]


def read_run_files(path: Path) -> list[RunFile]:
    """Read a run file, the file that it extends, the one that this extends, and so on. Raises UserError."""
    found: list[RunFile] = []
    while True:
        own = read_json(path)
        if own.keys() >= MANIFEST_KEYS:
            raise UserError(f"{path}: it is a dataset's manifest; `megagpt init DATA` writes a run file for it")
        has_base, base = EXTENDS in own, own.pop(EXTENDS, None)
        found.append(RunFile(path, own))
        if not has_base:
            return found
        following = _base_of(path, base)
        if any(following.samefile(file.path) for file in found):
            raise UserError(f"{path}: extends={base!r} leads back to {following}; remove extends from one of the files")
        path = following


def _base_of(path: Path, base: Any) -> Path:
    """Return the path that `extends` means, which is relative to the file that has the key. Raises UserError."""
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f'{path}: extends={as_written(base)} is not a path; write one, such as "extends": "base.json"')
    try:
        following = path.parent / local_path(base)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from None
    if not following.is_file():
        raise UserError(
            f"{path}: extends={base!r}: there is no file {following}; the path is relative to the folder of {path.name}"
        )
    return following


def merged(files: Sequence[RunFile]) -> dict[str, Any]:
    """Return the object that the files make, each of which changes the next one's."""
    *changing, first = files
    raw = first.own
    for file in reversed(changing):
        raw = _patched(raw, file.own)
    return raw


def _patched(base: Any, change: dict[str, Any]) -> dict[str, Any]:
    """Merge as RFC 7396 (JSON Merge Patch): sections key by key, lists and values replace, null removes the key."""
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _patched(result.get(key), value) if isinstance(value, dict) else value
    return result


def named(files: Sequence[RunFile]) -> str:
    """Return the beginning of a message about a run file: its path, and those that it extends."""
    return ", which extends ".join(str(file.path) for file in files)


def file_with(key: str, files: Sequence[RunFile]) -> Path:
    """Return the path of the file whose value of a dotted key acts; of the first if none has it."""
    return next((file.path for file in files if key in dict(dotted_items(file.own))), files[0].path)
