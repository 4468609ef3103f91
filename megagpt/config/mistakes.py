"""Phrase what pydantic found wrong: the key as it is typed, the value seen, and the nearest right key."""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from megagpt.config.other_trainers import NOTES, OUR_KEY, WITHOUT_KEY
from megagpt.config.schema_keys import keys_at, section_at, typed_keys
from megagpt.options import LARGEST

MISSING = "{} is missing"
IN_QUOTES = "{}={} is in quotes; write it without them"
LONGEST_VALUE = 100  # characters of a value that a message quotes


def explain(
    error: ValidationError, root: type[BaseModel], *, section: str, elsewhere: Collection[str] | None = None
) -> str:
    """Describe each mistake in a phrase: the dotted key, what is wrong, the value seen or the nearest right key."""
    found = mistakes(error, root, section=section, elsewhere=elsewhere)
    return "; ".join(phrase for _, phrase in without_consequences(found))


def mistakes(
    error: ValidationError, root: type[BaseModel], *, section: str, elsewhere: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield each mistake that pydantic found as (dotted key, phrase).

    `elsewhere` are the keys among which an unknown one may belong; by default those of the root and of its sections.
    """
    for detail in error.errors():
        dotted = ".".join(map(str, (section, *detail["loc"]) if section else detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = keys_at(root, detail["loc"][:-1])
            keys = typed_keys(root, section) if elsewhere is None else elsewhere
            typed = only_key(dotted, detail["input"])
            yield dotted, unknown_key(typed if meant_keys(typed, known, keys) else dotted, known, keys)
        elif detail["type"] == "missing":
            yield dotted, MISSING.format(dotted)
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
        elif detail["type"] == "literal_error":
            expected = detail["ctx"]["expected"]
            near = get_close_matches(_lower(detail["input"]), re.findall("'([^']*)'", expected), n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            yield dotted, f"{dotted}={as_written(detail['input'])} is not {expected}{meant}"
        elif detail["type"] in BOUNDS:
            key, how, bound = BOUNDS[detail["type"]]
            limit = detail["ctx"][key]
            limit = f"{limit:g}" if isinstance(limit, float) else limit
            yield dotted, f"{dotted}={as_written(detail['input'])} is too {how}; set it to {bound} {limit}"
        elif detail["type"] == "quoted":
            yield dotted, IN_QUOTES.format(dotted, as_written(detail["input"]))
        elif detail["type"] == "model_type":
            said = no_section(dotted, detail["input"], keys_at(root, detail["loc"]))
            yield dotted, said if ";" in said else said + _keys_instead(root, detail["loc"], dotted, detail["input"])
        elif detail["type"] in NUMBERS and (number := _number_meant(detail["input"])):
            yield dotted, f"{dotted}={as_written(detail['input'])} is not a number; write {dotted}={number}"
        elif detail["type"] in IS_NOT:
            yield dotted, f"{dotted}={as_written(detail['input'])} is not {IS_NOT[detail['type']]}"
        else:
            yield dotted, f"{dotted}={as_written(detail['input'])}: {detail['msg']}"


def without_consequences(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the mistakes without the consequences of another: a key that is missing and was written elsewhere."""
    kept = list(found)
    hints = [phrase for _, phrase in kept if "did you mean" in phrase]
    return [
        (key, phrase)
        for key, phrase in kept
        if phrase != MISSING.format(key) or not any(f"'{key}{end}" in hint for hint in hints for end in "'.")
    ]


# pydantic's error type -> what the value should be. Its own messages name Python's types.
IS_NOT = {
    "tuple_type": "a list [...]",
    "path_type": "a path",
    "validation_sets": 'a path, and no sets by name such as {"web": {"path": "data/web"}}',
    "string_type": "a text",
    "string_too_short": "a text of a letter or more",
    "string_unicode": "Unicode text",
    "not_a_number": "a number",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number; give one, or leave it out",
    "int_from_float": "a whole number",
    "int_parsing_size": f"a number within {LARGEST}",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}
NUMBERS = ("not_a_number", "int_type", "float_type")
# pydantic's error type -> the name of the bound, what the value is, what it should be.
BOUNDS = {
    "greater_than": ("gt", "small", "more than"),
    "greater_than_equal": ("ge", "small", "at least"),
    "less_than": ("lt", "large", "less than"),
    "less_than_equal": ("le", "large", "at most"),
}
MEANT = re.compile(r"([0-9]+(?:[._][0-9]+)*|[0-9]{1,3}(?:,[0-9]{3})+) ?([kKmMgG])?[bB]?(%)?")
TIMES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
MOST_KEYS = 12  # that a message lists


def _number_meant(value: Any) -> str:
    """Return the number of a text such as 8k, 8,000, 8MB or 5%, as it is to be written; nothing for another value."""
    found = MEANT.fullmatch(value) if isinstance(value, str) else None
    if not found or found[1].count(".") > 1:
        return ""
    number = float(found[1].replace(",", "")) * TIMES[(found[2] or "").lower()] / (100 if found[3] else 1)
    return f"{int(number)}" if number == int(number) else f"{number:.12g}"


def _keys_instead(root: type[BaseModel], loc: tuple[int | str, ...], dotted: str, value: Any) -> str:
    """Return what to write where a value was given to a section: the one key of it that takes the value, or all."""
    outer, section = section_at(root, loc[:-1]), section_at(root, loc)
    if section is None:
        return ""
    keys = [f"{dotted}.{name}" for name in section.model_fields]
    listed = ", ".join(keys[:MOST_KEYS]) + (", ..." if len(keys) > MOST_KEYS else "")
    if isinstance(value, str) and value in section.model_fields and _takes(section, value, True):
        return f"; write {dotted}.{value}=true"
    if outer is not None and isinstance(loc[-1], str) and _takes(outer, loc[-1], True):
        return f"; write {dotted}=true, or set a key of it: {listed}"
    # Many keys take any text, so a word says nothing of which is meant, but a path does.
    is_word = isinstance(value, str) and not {".", "/"} & set(value)
    takes = [name for name in section.model_fields if value is not None and _takes(section, name, value)]
    takes = [name for name in takes if not (is_word and _takes(section, name, "no such word"))]
    if len(takes) == 1:
        return f"; write {dotted}.{takes[0]}={value if isinstance(value, str) else json.dumps(value)}"
    return f"; set a key of it: {listed}"


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def _takes(model: type[BaseModel], name: str, value: Any) -> bool:
    """Tell whether a field of a model takes a value."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return not any(detail["loc"][:1] == (name,) for detail in error.errors())
    return True


# The key that a value stands for where it is given instead of the section: `bf16=true`, `zero_optimization=2`.
MAIN_KEYS = {bool: ("enabled",), int: ("stage", "patience"), str: ("type", "policy", "kind")}


def no_section(dotted: str, value: Any, keys: Collection[str]) -> str:
    """Return a message about a value where a section with these keys should be."""
    key = next((key for key in MAIN_KEYS.get(type(value), ()) if key in keys), None)
    way_out = f"; set {dotted}.{key} to {json.dumps(value)}" if key else ""
    return f"{dotted}={as_written(value)} is not a section {{...}}{way_out}"


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


def unknown_key(dotted: str, known: Collection[str], elsewhere: Collection[str]) -> str:
    """Return a message about an unknown key with the keys that may have been meant, each as it is typed.

    `known` are the names of its own section's keys. The likeliest slip is to leave out the section, or to take another;
    the next is another trainer's name, then a misspelt one.
    """
    section, _, name = dotted.rpartition(".")
    first = section.partition(".")[0]
    if "train_batch_size" in elsewhere and first in ("", "megagpt", "optimizer") and name in WITHOUT_KEY:
        return f"unknown key {as_written(dotted)}: {WITHOUT_KEY[name]}"
    if meant := meant_keys(dotted, known, elsewhere):
        note = NOTES.get(name, NOTES.get(meant[0])) if OUR_KEY.get(name) in meant else None
        hint = f"did you mean {' or '.join(map(repr, meant))}?{f' {note}' if note else ''}"
        return f"unknown key {as_written(dotted)}; {hint}"
    return f"unknown key {as_written(dotted)}; known are {', '.join(sorted(_own(dotted, known)))}"


def meant_keys(dotted: str, known: Collection[str], elsewhere: Collection[str]) -> list[str]:
    """Return the keys that an unknown one may stand for, as unknown_key names them; none if nothing is near."""
    # A name that many sections have, such as `rate`, is no guess.
    guesses = ([key for key in guess if key != dotted] for guess in _guesses(dotted, known, elsewhere))
    return next((guess for guess in guesses if 0 < len(guess) <= 3), [])


def _own(dotted: str, known: Collection[str]) -> dict[str, str]:
    """Return the names of the keys in the section of a dotted key, by their dotted keys."""
    section = dotted.rpartition(".")[0]
    return {f"{section}.{key}".lstrip("."): key for key in known}


def _guesses(dotted: str, known: Collection[str], elsewhere: Collection[str]) -> Iterator[list[str]]:
    name = dotted.rpartition(".")[2].replace("-", "_")
    names = {key: key.rpartition(".")[2] for key in elsewhere}
    own = _own(dotted, known)

    def like(names: Mapping[str, str], cutoff: float) -> list[str]:
        near = get_close_matches(name, sorted(set(names.values())), n=1, cutoff=cutoff)
        return sorted(key for key in names if names[key] in near)

    # The builder has no such names of other trainers.
    yield [OUR_KEY[name]] if name in OUR_KEY and "train_batch_size" in elsewhere else []
    parts = dotted.split(".")
    for i in range(len(parts)):
        ending = ".".join(parts[i:])
        yield sorted(key for key in elsewhere if f".{key}".endswith(f".{ending}"))
    yield like(own, 0.8)
    yield like(names, 0.8)
    yield like(own, 0.6)


def only_key(dotted: str, value: Any) -> str:
    """Return the dotted key of the only value in a section, as an override gives one; else the section's."""
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        dotted = f"{dotted}.{key}"
    return dotted


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the nearest right one, or all if none is near."""
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
