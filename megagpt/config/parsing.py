"""Read JSON and `key.path=value` overrides into checked models; mistakes.py phrases what is wrong."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import json5
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megagpt.config.mistakes import as_written, is_quoted, shortened
from megagpt.config.not_json import near, not_a_file, way_out
from megagpt.config.schema_keys import kinds_of
from megagpt.errors import UserError
from megagpt.options import LARGEST
from megagpt.user_paths import local_path


class Checked(BaseModel):
    """A frozen model that takes neither true, false or text for numbers, nor an empty text for a path."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_the_fields_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = kinds_of(cls, info.field_name or "")
        values = value if isinstance(value, list | tuple) else [value]
        if not kinds.isdisjoint({int, float}) and bool not in kinds and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("not_a_number", "is not a number")
        texts = [v for v in values if isinstance(v, str)] if str not in kinds else []
        if texts and not kinds.isdisjoint({int, float, bool}):
            # pydantic would take a number, true or false in quotes
            right = "not_a_number" if bool not in kinds else "bool_type"
            raise PydanticCustomError("quoted" if is_quoted(texts[0]) else right, "is a text")
        if Path in kinds and (value == "" or "\0" in str(value)):
            raise PydanticCustomError("path_type", "is not a path")
        return value


class Strict(Checked):
    """A model in which a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid")


UserPath = Annotated[Path, BeforeValidator(lambda path: local_path(path) if isinstance(path, str) else path)]
"""A path in a file of options or an override: `~` and variables are expanded."""


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a file's object with single keys changed, without `$schema`. Raises UserError."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        _override(raw, item)
    raw.pop("$schema", None)
    return raw


def read_json(path: Path, *, what: str = "run file") -> dict[str, Any]:
    """Read the object in a JSON or JSON5 file, which `what` names in messages.

    JSON5 adds comments and commas after the last value. Raises UserError if the file is missing, is neither, or gives
    a key twice.
    """
    try:
        raw = _json_or_json5(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        examples = "; examples are in ds_configs/" if what == "run file" else ""
        raise UserError(f"{what} {path} does not exist{near(path) or examples}") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} cannot be read: {not_a_file(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} cannot be read: it is not UTF-8 text; save it as that") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except NotJson as error:
        raise UserError(str(error)) from None
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path}: its brackets are nested too deep") from None
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} holds a JSON {type(raw).__name__}; it must be an object {{...}}")
    return raw


class NotJson(ValueError):
    """A file is neither JSON nor JSON5; the message begins with the place."""


def _json_or_json5(text: str, path: Path) -> Any:
    """Parse JSON, and what is not JSON as JSON5, whose parser is a thousand times slower. Raises as _json, and NotJson.

    An error is JSON5's: JSON's own would be at the first comment.
    """
    with suppress(json.JSONDecodeError):
        return _json(text)
    if not text.strip():
        raise NotJson(f"{path}, line 1, column 1: not JSON: the file is empty")
    try:
        return json5.loads(text, **HOOKS)
    except ValueError as error:
        if (found := JSON5_ERROR.fullmatch(str(error))) is None:
            # The text of an error of ours, which json5 raises again as its own.
            raise UserError(str(error)) from None
        line, what, column = found.groups()
        way = way_out(text, path.suffix, int(line), int(column))
        raise NotJson(f"{path}, line {line}, column {column}: not JSON: {as_written(what)[1:-1]}{way}") from None


def _json(text: str) -> Any:
    """Parse JSON. Raises UserError for a key that is given twice, and for a number that is not finite or too large."""
    return json.loads(text, **HOOKS)


def _not_finite(text: str) -> float:
    raise UserError(f"{text} is not a finite number; give another")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise UserError(f"the number {shortened(text)} is too large; give one within 1.7e308")
    return number


def _within_64_bits(text: str, base: int = 10) -> int:
    # int() refuses more than 4,300 digits.
    if len(text) > 20 or not -LARGEST <= int(text, base) <= LARGEST:
        raise UserError(f"the number {shortened(text)} is too large; give one within {LARGEST}")
    return int(text, base)


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"one section gives {', '.join(map(repr, repeated))} twice; keep one")
    return dict(pairs)


HOOKS: dict[str, Any] = {
    "object_pairs_hook": _no_duplicate_keys,
    "parse_constant": _not_finite,
    "parse_float": _finite,
    "parse_int": _within_64_bits,
}
# The messages of json5, whose columns count from 1.
# What people type on a command line that is not JSON.
BARE = {"True": True, "False": False, "None": None}
NUMBER = re.compile(r"[+-]?(?:\d+\.|\d*\.\d+|[1-9]\d*)(?:[eE][+-]?\d+)?")  # 1., .5, +3e-4
JSON5_ERROR = re.compile(r"<string>:(\d+) (.*) at column (\d+)", re.DOTALL)


def _override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key in place; a number indexes a list. The value is JSON, or text if it does not parse as JSON."""
    dotted, sep, text = item.partition("=")
    if not sep or not dotted:
        hint = "; a run file goes after --deepspeed_config" if item.endswith((".json", ".jsonc", ".json5")) else ""
        raise UserError(f"override {as_written(item)} is not of the form key.path=value{hint}")
    try:
        value = _json(text)
    except UserError as error:
        raise UserError(f"override {as_written(item)}: {error}") from None
    except (ValueError, RecursionError):
        value = BARE.get(text, text)
        if NUMBER.fullmatch(text):
            value = float(text)
    *parents, leaf = dotted.split(".")
    node: Any = raw
    outer: list[str] = []
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
            outer.append(key)
        node[int(leaf) if isinstance(node, list) else leaf] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        is_section = isinstance(node, dict | list)
        why = "" if is_section else f", because {'.'.join(outer)}={as_written(node)} is not a section {{...}}"
        raise UserError(f"override {as_written(item)}: there is no {as_written(dotted)} to set{why}") from None


ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u(?![dD][89a-fA-F])([0-9a-fA-F]{4})|([nrtfv0\\]))")
ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""Replace the escapes in text from a command line, which a shell passes on as typed: `\n`, `\t`, `\x1e`, `\u2029`.

    Two backslashes make one. Others stay.
    """
    return ESCAPE.sub(lambda found: ESCAPED[found[3]] if found[3] else chr(int(found[1] or found[2], 16)), text)


def dotted_items(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of nested sections as (dotted key, value): a section itself, then what is in it.

    A list is a value.
    """
    for key, value in section.items():
        dotted = f"{path}.{key}" if path else str(key)
        yield dotted, value
        if isinstance(value, dict):
            yield from dotted_items(value, dotted)


def leaves(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested sections that are not sections themselves, by their dotted keys."""
    return {key: value for key, value in dotted_items(section) if not isinstance(value, dict)}
