"""Phrase what pydantic found wrong: the key as it is typed, the value seen, and the nearest right key."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megagpt.options import LARGEST

IN_QUOTES = "{}={} is in quotes; write it without them"
LONGEST_VALUE = 100  # characters of a value that a message quotes


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
        elif detail["type"] == "quoted":
            yield dotted, IN_QUOTES.format(dotted, as_written(detail["input"]))
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
    "int_from_float": "a whole number",
    "int_parsing_size": f"a number within {LARGEST}",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def as_written(value: Any) -> str:
    """Format a value as JSON, but text in single quotes, as in our other messages; of a long one, its ends."""
    return shortened(repr(value) if isinstance(value, str) else json.dumps(value, default=str))


def is_quoted(value: Any) -> bool:
    """Tell whether a value is a text that would be a number, true or false without its quotes."""
    if not isinstance(value, str):
        return False
    try:
        return value in ("true", "false") or math.isfinite(float(value))
    except ValueError:
        return False


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
