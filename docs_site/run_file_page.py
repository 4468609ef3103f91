"""Write the page of a run file's keys from its JSON schema, and of a build's options from their pydantic model."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from data_tools.arguments import option_defaults
from data_tools.config import BuildConfig
from docs_site.markdown import code, page, plain, term
from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.run_file import run_schema
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import models_in
from megagpt.options import LARGEST

Schema = dict[str, Any]
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
INTRODUCTION = """Every key that a run file may have, from the models that check it: its type and limits, its default,
and its meaning. [Run files](../ds_configs/README.md) says how such a file is written, and what the keys do together; in
[the training page](../docs/train.md) they stand by task. On a command line a key is written as here, as in
`megagpt train RUN.json megagpt.every.eval=100`; in a file its parts are nested objects. A key that is marked required
has no default."""


def run_file_page() -> str:
    """Return the page of all keys of a run file, ours first."""
    schema = run_schema()
    ours = schema["properties"].pop("megagpt")
    untyped = [name for name, facts in schema["properties"].items() if set(facts) == {"description"}]
    named = schema | {"properties": {k: v for k, v in schema["properties"].items() if k not in untyped}}
    models = dict(_models(DeepSpeedConfig)) | dict(_models(MegaGPTConfig))
    parts = [INTRODUCTION, "## Keys of megagpt", *_section(ours, "megagpt", schema["$defs"], models)]
    parts += ["## Keys of DeepSpeed that megagpt reads too", *_section(named, "", schema["$defs"], models)]
    parts += [
        "## Keys that DeepSpeed alone reads",
        "They are handed over as written; DeepSpeed's documentation has the keys within them.",
        *(term(name, "", plain(schema["properties"][name]["description"]), anchor=name) for name in untyped),
    ]
    return page("Keys of a run file", parts)


def _models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every model in a model by its name, itself too."""
    yield model.__name__, model
    for info in model.model_fields.values():
        for annotation in (info.annotation, *getattr(info.annotation, "__args__", ())):
            for inner in models_in(annotation):
                yield from _models(inner)


def _section(schema: Schema, prefix: str, defs: Schema, models: dict[str, type[BaseModel]]) -> Iterator[str]:
    """Yield a section's heading, its keys, what is checked about them together, then its sections."""
    inner = []
    if prefix not in ("", "megagpt"):
        yield f"### {code(prefix)}"
        yield plain(schema["description"])
    for name, facts in schema["properties"].items():
        key = f"{prefix}.{name}" if prefix else name
        if section := _section_of(facts, defs):
            inner.append((defs[section], f"{key}{_place(facts)}"))
        if "$ref" not in facts:
            yield term(key, _facts(facts, name in schema.get("required", ())), _meaning(facts), anchor=key)
    model = models.get(schema.get("title", ""), MegaGPTConfig if prefix == "megagpt" else DeepSpeedConfig)
    if rules := [name.strip("_").replace("_", " ") for name in model.__pydantic_decorators__.model_validators]:
        yield f"Checked together, where a file is read: {'; '.join(map(plain, rules))}."
    for section_schema, key in inner:
        yield from _section(section_schema, key, defs, models)


def _section_of(facts: Schema, defs: Schema) -> str | None:
    """Return the name of the model that a key holds: one, null or one, a list of them, or several by name."""
    for where in (facts, facts.get("items", {}), facts.get("additionalProperties", {}), *facts.get("anyOf", ())):
        if isinstance(where, dict) and (name := where.get("$ref", "").rpartition("/")[2]) in defs:
            return str(name)
        if where is not facts and isinstance(where, dict) and ("items" in where or "additionalProperties" in where):
            return _section_of(where, defs)
    return None


def _place(facts: Schema) -> str:
    """Return how an entry of a list, or of several by name, follows its key."""
    return "[i]" if "items" in facts else ".NAME" if isinstance(facts.get("additionalProperties"), dict) else ""


def _meaning(facts: Schema) -> str:
    return plain(facts.get("description", ""))


def _facts(facts: Schema, is_required: bool) -> str:
    default = "**required**" if is_required else f"default {code(_as_json(facts.get('default')))}"
    return f"{plain(type_in_words(facts))} · {default}"


def type_in_words(facts: Schema) -> str:
    """Return a key's type with its limits, in words; a model that it names by the name."""
    if "anyOf" in facts:
        return " or ".join(type_in_words(choice) for choice in facts["anyOf"])
    if "enum" in facts or "const" in facts:
        choices = facts.get("enum", [facts.get("const")])
        return ("one of " if len(choices) > 1 else "") + ", ".join(f"`{value}`" for value in choices)
    if "$ref" in facts:
        return f"`{facts['$ref'].rpartition('/')[2]}`"
    if facts.get("type") == "array":
        if "prefixItems" in facts:
            return " and ".join(type_in_words(item) for item in facts["prefixItems"])
        least = f", {facts['minItems']} at least" if facts.get("minItems") else ""
        return f"list, each {type_in_words(facts.get('items', {}))}{least}"
    if facts.get("type") == "object":
        inner = facts.get("additionalProperties")
        return f"object of names, each {type_in_words(inner if isinstance(inner, dict) else {})}"
    name = "path" if facts.get("format") == "path" else TYPES.get(facts.get("type", ""), "any value")
    return name + _limits(facts)


def _limits(facts: Schema) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    limits = " ".join(f"{word} {_number(facts[key])}" for key, word in words.items() if key in facts)
    return (f" {limits}" if limits else "") + (", not empty" if facts.get("minLength") else "")


def _number(value: float) -> str:
    return "2^63 - 1" if value == LARGEST else f"{value:g}" if abs(value) >= 1e6 else f"{value:,.12g}"


def _as_json(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f'"{value}"' if isinstance(value, str) else str(list(value)) if isinstance(value, tuple) else str(value)


def build_options_page() -> str:
    """Return the page of all options of `python -m data_tools build`."""
    parts = [
        "Every option of `python -m data_tools build`, as typed behind it, with its default. In a file that `--config` "
        "names, the parts of a key are nested objects. [Building data](../docs/data.md) says what they are for."
    ]
    section = ""
    for key, default, description in option_defaults(BuildConfig):
        if (own := key.rpartition(".")[0]) != section:
            section = own
            parts.append(f"## {code(own)}")
        parts.append(term(key, f"default {code(default)}" if default else "", plain(description), anchor=key))
    return page("Options of a build", parts)
