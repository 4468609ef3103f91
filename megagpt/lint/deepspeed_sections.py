"""Every section of DeepSpeed's configuration with its keys and defaults, whether DeepSpeed has a model of it or not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from megagpt.config.deepspeed_keys import DEEPSPEED_DEFAULTS
from megagpt.config.schema_keys import models_in
from megagpt.engine.deepspeed_models import SECTION_MODELS


@dataclass(frozen=True)
class Section:
    """`defaults` holds every key that may be written, under both of its names if it has an alias."""

    defaults: Mapping[str, Any]
    model: type[BaseModel] | None = None  # DeepSpeed's own, which checks the values


@cache
def deepspeed_sections() -> dict[str, Section]:
    """Return the sections by their dotted names, those inside other sections too; "" is the top level."""
    top = {key: None if isinstance(default, dict) else default for key, default in DEEPSPEED_DEFAULTS.items()}
    untyped = {name: Section(keys) for name, keys in DEEPSPEED_DEFAULTS.items() if isinstance(keys, dict)}
    typed = dict(pair for name, model in SECTION_MODELS.items() for pair in _typed(name, model))
    return {"": Section(top), **untyped, **typed}


def _typed(name: str, model: type[BaseModel]) -> Iterator[tuple[str, Section]]:
    """Yield a typed section and all that are fields of it."""
    fields = model.model_fields.items()
    yield name, Section({key: info.default for field, info in fields for key in (field, info.alias or field)}, model)
    for field, info in fields:
        for inner in models_in(info.annotation):
            yield from _typed(f"{name}.{field}", inner)
