"""From JSON and `key.path=value` to checked models, with errors that name the key and the nearest right one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.errors import UserError


class Strict(BaseModel):
    """Frozen, and a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's object (which is not changed) with single keys changed. Raises UserError."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        _override(raw, item)
    raw.pop("$schema", None)
    return raw


def read_json(path: Path, *, what: str = "run file") -> dict[str, Any]:
    """The object in a JSON file; `what` names the file in messages. Raises UserError."""
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
    except ValueError as error:  # a number of more than 4,300 digits
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
    """Set one dotted key; a number steps into a list. The value is JSON, or text if it is not."""
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


def dotted_items(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested sections as (dotted key, value): a section itself, then what is in it. A list is a value."""
    for key, value in section.items():
        dotted = f"{path}.{key}" if path else str(key)
        yield dotted, value
        if isinstance(value, dict):
            yield from dotted_items(value, dotted)


def leaves(section: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested sections that are not sections themselves, by their dotted keys."""
    return {key: value for key, value in dotted_items(section) if not isinstance(value, dict)}


def explain(error: ValidationError, root: type[BaseModel], *, section: str) -> str:
    """Each mistake in a phrase: the dotted key, what is wrong, the value seen or the nearest right key."""
    return "; ".join(phrase for _, phrase in mistakes(error, root, section=section))


def mistakes(error: ValidationError, root: type[BaseModel], *, section: str) -> Iterator[tuple[str, str]]:
    """Each mistake as (dotted key, phrase)."""
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
            if not detail["input"]:  # else what it holds is wrong, and is named by itself
                yield dotted, f"{dotted} is an empty list"
        elif detail["type"] == "enum":  # which names an alias as one more value
            allowed = ", ".join(dict.fromkeys(detail["ctx"]["expected"].replace(" or ", ", ").split(", ")))
            yield dotted, f"{dotted}={as_written(detail['input'])} is none of {allowed}"
        elif detail["type"] in IS_NOT:
            yield dotted, f"{dotted}={as_written(detail['input'])} is not {IS_NOT[detail['type']]}"
        else:
            yield dotted, f"{dotted}={as_written(detail['input'])}: {detail['msg']}"


IS_NOT = {  # pydantic's own words name Python's types
    "model_type": "a section {...}",
    "tuple_type": "a list [...]",
    "path_type": "a path",
    "string_type": "a text",
}


def as_written(value: Any) -> str:
    """As JSON has it, but texts in quotes as our messages have them."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    for part in loc:
        if isinstance(part, str):
            model = next(models_in(model.model_fields[part].annotation))
    return set(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a field's annotation names: `M` itself, or those of `M | None` or `tuple[M, ...]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def did_you_mean(key: str, known: set[str] | frozenset[str]) -> str:
    near = get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
