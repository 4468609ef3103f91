"""Read JSON and `key.path=value` overrides into checked models; an error names the key and the nearest right one."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megagpt.errors import UserError
from megagpt.options import LARGEST
from megagpt.user_paths import expanded

LONGEST_VALUE = 100  # characters of a value that a message quotes


class Checked(BaseModel):
    """A frozen model that takes neither true and false for numbers, nor an empty text for a path."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_the_fields_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = kinds_of(cls, info.field_name or "")
        values = value if isinstance(value, list | tuple) else [value]
        if not kinds.isdisjoint({int, float}) and bool not in kinds and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("not_a_number", "is not a number")
        if Path in kinds and (value == "" or "\0" in str(value)):
            raise PydanticCustomError("path_type", "is not a path")
        return value


class Strict(Checked):
    """A model in which a misspelt key is an error rather than a silent default."""

    model_config = ConfigDict(extra="forbid")


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
        raw = _json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        examples = "; examples are in ds_configs/" if what == "run file" else ""
        raise UserError(f"{what} {path} does not exist{examples}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path}: its brackets are nested too deep") from None
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} holds a JSON {type(raw).__name__}; it must be an object {{...}}")
    return raw


def _json(text: str) -> Any:
    """Parse JSON. Raises UserError for a key that is given twice, and for a number that is not finite or too large."""
    return json.loads(
        text,
        object_pairs_hook=_no_duplicate_keys,
        parse_constant=_not_finite,
        parse_float=_finite,
        parse_int=_within_64_bits,
    )


def _not_finite(text: str) -> float:
    raise UserError(f"{text} is not a finite number; give another")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise UserError(f"the number {shortened(text)} is too large; give one within 1.7e308")
    return number


def _within_64_bits(text: str) -> int:
    # int() refuses more than 4,300 digits.
    if len(text) > 20 or not -LARGEST <= int(text) <= LARGEST:
        raise UserError(f"the number {shortened(text)} is too large; give one within {LARGEST}")
    return int(text)


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
        raise UserError(f"override {as_written(item)} is not of the form key.path=value{hint}")
    try:
        value = _json(text)
    except UserError as error:
        raise UserError(f"override {as_written(item)}: {error}") from None
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


def explain(
    error: ValidationError, root: type[BaseModel], *, section: str, elsewhere: Collection[str] | None = None
) -> str:
    """Describe each mistake in a phrase: the dotted key, what is wrong, the value seen or the nearest right key."""
    return "; ".join(phrase for _, phrase in mistakes(error, root, section=section, elsewhere=elsewhere))


def mistakes(
    error: ValidationError, root: type[BaseModel], *, section: str, elsewhere: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield each mistake that pydantic found as (dotted key, phrase).

    `elsewhere` are the keys among which an unknown one may belong; by default those of the root and of its sections.
    """
    for detail in error.errors():
        dotted = ".".join(map(str, (section, *detail["loc"]) if section else detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = _fields_at(root, detail["loc"][:-1])
            yield dotted, unknown_key(dotted, known, typed_keys(root, section) if elsewhere is None else elsewhere)
        elif detail["type"] == "missing":
            yield dotted, f"{dotted} is missing"
        elif detail["type"] in ("value_error", "assertion_error"):
            why = str(detail["ctx"]["error"])
            yield dotted, why if why.startswith(dotted) else f"{dotted}: {why}"
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
    "not_a_number": "a number",
    "int_parsing_size": f"a number within {LARGEST}",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def as_written(value: Any) -> str:
    """Format a value as JSON, but text in single quotes, as in our other messages; of a long one, its ends."""
    return shortened(repr(value) if isinstance(value, str) else json.dumps(value, default=str))


def shortened(text: str) -> str:
    """Return the text, or both ends of a long one."""
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 30]} ... {text[-20:]}"


@cache
def kinds_of(model: type[BaseModel], field: str) -> frozenset[Any]:
    """Return the types that a field's annotation names, at any depth."""
    return frozenset(_named_in(model.model_fields[field].annotation))


def _named_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        # Not the values of a Literal, some of which have no hash.
        if isinstance(part, type) or get_args(part):
            yield from _named_in(part)


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


@cache
def typed_keys(root: type[BaseModel], section: str = "") -> frozenset[str]:
    """Return every dotted key of a model and of the sections in it, as on a command line, except those within lists."""
    return frozenset(_typed_keys(root, section))


def _typed_keys(root: type[BaseModel], section: str) -> Iterator[str]:
    for name, info in root.model_fields.items():
        dotted = f"{section}.{name}" if section else name
        yield dotted
        if not any(get_origin(kind) is tuple for kind in kinds_of(root, name)):
            for model in models_in(info.annotation):
                yield from _typed_keys(model, dotted)


def unknown_key(dotted: str, known: Collection[str], elsewhere: Collection[str]) -> str:
    """Return a message about an unknown key with the keys that may have been meant, each as it is typed.

    `known` are the names of its own section's keys. The likeliest slip is to leave out the section, or to take another;
    the next is a misspelt name.
    """
    section, _, name = dotted.rpartition(".")
    names = {key: key.rpartition(".")[2] for key in elsewhere}
    own = {f"{section}.{key}".lstrip("."): key for key in known}

    def like(names: Mapping[str, str], cutoff: float) -> list[str]:
        near = get_close_matches(name, sorted(set(names.values())), n=1, cutoff=cutoff)
        return sorted(key for key in names if names[key] in near)

    guesses = (
        sorted(key for key in elsewhere if key.endswith(f".{dotted}")),
        sorted(key for key in elsewhere if names[key] == name),
        like(own, 0.8),
        like(names, 0.8),
        like(own, 0.5),
    )
    # A name that many sections have, such as `rate`, is no guess.
    if meant := next((guess for guess in guesses if 0 < len(guess) <= 3), None):
        return f"unknown key {as_written(dotted)}; did you mean {' or '.join(map(repr, meant))}?"
    return f"unknown key {as_written(dotted)}; known are {', '.join(sorted(own))}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the nearest right one, or all if none is near."""
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
