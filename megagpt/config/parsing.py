"""Read JSON and `key.path=value` overrides into checked models; an error names the key and the nearest right one."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from megagpt.errors import UserError
from megagpt.user_paths import expanded


class Strict(BaseModel):
    """A frozen model in which a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


UserPath = Annotated[Path, BeforeValidator(lambda path: expanded(path) if isinstance(path, str) else path)]
"""A path in a file of options or an override: `~` and variables are expanded."""


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a file's object with single keys changed, without `$schema`. Raises UserError."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        _override(raw, item)
    raw.pop("$schema", None)
    return raw


def read_json(path: Path, *, what: str = "run file") -> dict[str, Any]:
    """Read the object in a JSON file, which `what` names in messages.

    Raises UserError if the file is missing, is not a JSON object, or gives a key twice.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicate_keys)
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; examples are in ds_configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except UserError:
        raise
    except ValueError as error:
        # A number of more than 4,300 digits.
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path}: its brackets are nested too deep") from None
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} holds a JSON {type(raw).__name__}; it must be an object {{...}}")
    return raw


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"one section gives {', '.join(map(repr, repeated))} twice; keep one")
    return dict(pairs)


def _override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key in place; a number indexes a list. The value is JSON, or text if it does not parse as JSON."""
    dotted, sep, text = item.partition("=")
    if not sep or not dotted:
        hint = "; a run file goes after --deepspeed_config" if item.endswith(".json") else ""
        raise UserError(f"override {item!r} is not of the form key.path=value{hint}")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicate_keys)
    except UserError:
        raise
    except (ValueError, RecursionError):
        value = text
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
        raise UserError(f"override {item!r}: there is no {dotted!r} to set{why}") from None


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


def explain(error: ValidationError, root: type[BaseModel], *, section: str) -> str:
    """Describe each mistake in a phrase: the dotted key, what is wrong, the value seen or the nearest right key."""
    return "; ".join(phrase for _, phrase in mistakes(error, root, section=section))


def mistakes(error: ValidationError, root: type[BaseModel], *, section: str) -> Iterator[tuple[str, str]]:
    """Yield each mistake that pydantic found as (dotted key, phrase)."""
    for detail in error.errors():
        dotted = ".".join(map(str, (section, *detail["loc"]) if section else detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = _fields_at(root, detail["loc"][:-1])
            yield dotted, f"unknown key {dotted!r}{did_you_mean(str(detail['loc'][-1]), known)}"
        elif detail["type"] == "missing":
            yield dotted, f"{dotted} is missing"
        elif detail["type"] in ("value_error", "assertion_error"):
            yield dotted, f"{dotted}: {detail['ctx']['error']}" if dotted else str(detail["ctx"]["error"])
        elif detail["type"] == "too_short":
            # If the list has items, they are wrong, and each has an error of its own.
            if not detail["input"]:
                yield dotted, f"{dotted} is an empty list"
        elif detail["type"] == "enum":
            # Aliases of an enum repeat its values.
            allowed = ", ".join(dict.fromkeys(detail["ctx"]["expected"].replace(" or ", ", ").split(", ")))
            yield dotted, f"{dotted}={as_written(detail['input'])} is none of {allowed}"
        elif detail["type"] in IS_NOT:
            yield dotted, f"{dotted}={as_written(detail['input'])} is not {IS_NOT[detail['type']]}"
        else:
            yield dotted, f"{dotted}={as_written(detail['input'])}: {detail['msg']}"


# pydantic's error type -> what the value should be. Its own messages name Python's types.
IS_NOT = {
    "model_type": "a section {...}",
    "tuple_type": "a list [...]",
    "path_type": "a path",
    "string_type": "a text",
}


def as_written(value: Any) -> str:
    """Format a value as JSON, but text in single quotes, as in our other messages."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Return the keys of the section at this location of pydantic's, where a number is an index of a list."""
    for part in loc:
        if isinstance(part, str):
            model = next(models_in(model.model_fields[part].annotation))
    return set(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation names: `M` itself, or those of `M | None` or `tuple[M, ...]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def did_you_mean(key: str, known: set[str] | frozenset[str]) -> str:
    """Return the end of a message about an unknown key: the nearest right key, or all if none is near."""
    near = get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
