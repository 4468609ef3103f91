"""The part of a run file that names the validation data: one dataset, or several by names of the user's."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer
from pydantic_core import PydanticCustomError

from megagpt.config.parsing import Strict, UserPath
from megagpt.options import LARGEST
from megagpt.user_paths import local_path

# It is a part of metrics' names, of files' names and of overrides, whose parts a dot separates.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
UNNAMED = ""  # the name of a set that is given by its path alone
EXAMPLE = '{"web": {"path": "data/web"}}'


class ValidationSetConfig(Strict):
    """A dataset whose validation split is measured."""

    path: UserPath = Field(description="the folder of the dataset")
    tokens: int | None = Field(
        default=None, gt=0, le=LARGEST, description="tokens to validate on; null: megagpt.data.val_tokens"
    )
    weight: float | None = Field(
        default=None, gt=0.0, le=1e9, description="share in val/loss, relative to other weights; null: its tokens"
    )


def _by_name(value: Any) -> Any:
    """Return sets by their names; a path alone is one set without a name."""
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return {UNNAMED: {"path": local_path(str(value))}}
    if not isinstance(value, dict):
        raise PydanticCustomError("validation_sets", "is neither a path nor sets")
    if not value:
        raise ValueError(f"it names no set; give a path, or sets such as {EXAMPLE}")
    if isinstance(value.get("path"), str):
        raise ValueError(f'this set has no name; write {json.dumps({"NAME": value})}, or "val": "{value["path"]}"')
    for name, one in value.items():
        if not NAME.fullmatch(name):
            usable = re.sub("[^A-Za-z0-9_-]+", "_", name).strip("_-")[:64]
            raise ValueError(
                f"{name!r:.80} cannot be the name of a set: letters from a to z, digits, - and _ can, at most 64; "
                f"write {usable or 'web'!r}"
            )
        if isinstance(one, str):
            raise ValueError(f"{name} is a path alone; write {json.dumps({name: {'path': one}})}")
    lower: dict[str, str] = {}
    for name in value:
        if (other := lower.setdefault(name.lower(), name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} differ in capital letters only, which trackers mix up; rename one"
            )
    return value


def _as_given(value: Any, plain: SerializerFunctionWrapHandler) -> Any:
    """Write one set without a name as its path."""
    sets = plain(value)
    return sets[UNNAMED]["path"] if UNNAMED in sets else sets


def _schema(schema: dict[str, Any]) -> None:
    """Let an editor take a path, too."""
    sets = {key: schema.pop(key) for key in ("type", "additionalProperties")}
    schema["anyOf"] = [{"type": "string", "format": "path"}, sets]


ValidationSets = Annotated[
    dict[str, ValidationSetConfig],
    BeforeValidator(_by_name),
    WrapSerializer(_as_given),
    Field(json_schema_extra=_schema),
]
"""Validation sets by their names; a path in a run file is one set, UNNAMED."""


def sets_of(section: Mapping[str, Any], *, deciding: bool = False) -> dict[str, dict[str, Any]]:
    """Return the validation sets in the "megagpt" section of a run.json, of an older megagpt too.

    With `deciding` those that val/loss is measured on.
    """
    val, monitor = section["data"]["val"], section.get("early_stopping", {}).get("monitor", "val/loss")
    sets = val if isinstance(val, dict) else {UNNAMED: {"path": val}}
    one_decides = deciding and monitor not in ("val/loss", "val/ema_loss", "loss/val")
    decides = monitor.removeprefix("val/").removeprefix("ema_")
    return {name: one for name, one in sets.items() if not one_decides or decides == f"loss/{name}"}
