"""The space of a study: which keys of a run file are tuned, and between which values.

{
  "optimizer.type": {"choices": ["AdamW", "Muon"]},
  "optimizer.params.lr": {"low": 1e-4, "high": 1e-2, "log": true},
  "optimizer.params.muon_lr": {"low": 2e-3, "high": 2e-2, "log": true, "when": {"optimizer.type": "Muon"}},
  "megagpt.model.n_layer": {"low": 2, "high": 6}
}
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from optuna.trial import Trial
from pydantic import Field, ValidationError, model_validator

from megagpt.config.mistakes import as_written, did_you_mean
from megagpt.config.parsing import Strict, read_json
from megagpt.errors import UserError

# A key, or the section of several, whose values cannot be compared or are the study's own.
NOT_TUNED = {
    "megagpt.out_dir": "each trial has a folder of its own in the study",
    "megagpt.data.val": "losses on different data cannot be compared",
    "megagpt.data.val_tokens": "losses on different data cannot be compared",
    "megagpt.schedule.max_steps": "trials are compared after equal steps",
    "megagpt.schedule.max_tokens": "trials are compared after equal steps",
    "megagpt.schedule.max_epochs": "trials are compared after equal steps",
    "megagpt.early_stopping.monitor": "trials are compared by one loss",
    "megagpt.every": "evaluations are what trials are compared at",
    "megagpt.keep": "a study keeps the best trial's checkpoint alone",
}
Number = int | float
Value = bool | int | float | str | None | list[Any] | dict[str, Any]
Check = Callable[[Sequence[str]], object]  # raises UserError for options that the run file does not take
TRIES = 200  # combinations with a value among which one must be a run file


class Dimension(Strict):
    """The values of one key: a range, of whole numbers if both ends are, or choices."""

    low: Number | None = Field(default=None, description="lowest value of a range")
    high: Number | None = Field(default=None, description="highest value of a range")
    log: bool = Field(default=False, description="draw evenly over the logarithm")
    choices: tuple[Value, ...] | None = Field(default=None, min_length=1, description="values in place of a range")
    when: dict[str, Value] = Field(
        default={}, description="keys with choices that stand before this one, and the value that it needs of each"
    )

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> Self:
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError('give "low" and "high", or "choices"')
        if self.choices is not None:
            if self.log:
                raise ValueError('"log" is for a range; remove it, or give "low" and "high"')
            if len({json.dumps(choice) for choice in self.choices}) < len(self.choices):
                raise ValueError('"choices" has a value twice; remove one')
            return self
        if self.low is None or self.high is None:
            raise ValueError('"low" and "high" go together')
        if isinstance(self.low, bool) or isinstance(self.high, bool):
            raise ValueError('"low" and "high" are numbers; write "choices": [false, true]')
        if not self.low < self.high:
            raise ValueError(f'"low" is {self.low} and "high" {self.high}; "low" must be less')
        if self.log and self.low <= 0:
            raise ValueError(f'"low" is {self.low}, which has no logarithm; raise it, or remove "log"')
        return self

    @property
    def kind(self) -> Literal["choices", "int", "float"]:
        """The way in which values are drawn."""
        if self.choices is not None:
            return "choices"
        return "int" if isinstance(self.low, int) and isinstance(self.high, int) else "float"

    @property
    def extremes(self) -> tuple[Value, ...]:
        """The choices, or the ends of the range."""
        return self.choices if self.choices is not None else (self.low, self.high)

    def applies(self, drawn: Mapping[str, Value]) -> bool:
        """Tell whether the conditions hold among the values that were drawn before."""
        return all(name in drawn and drawn[name] == value for name, value in self.when.items())

    def draw(self, key: str, trial: Trial) -> Value:
        """Let the study choose a value; a range's of four digits, so that people can read and type it."""
        if self.choices is not None:
            # Optuna keeps plain numbers and texts alone; as JSON, sections of a run file are choices too.
            chosen = trial.suggest_categorical(key, [json.dumps(choice) for choice in self.choices])
            return json.loads(chosen)
        assert self.low is not None
        assert self.high is not None
        if self.kind == "int":
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        drawn = float(f"{trial.suggest_float(key, self.low, self.high, log=self.log):.4g}")
        return min(max(drawn, self.low), self.high)


class Space:
    """The dimensions of a study by their keys, in the order in which they are drawn."""

    def __init__(self, dimensions: dict[str, Dimension]) -> None:
        self.dimensions = dimensions

    def draw(self, trial: Trial) -> dict[str, Value]:
        """Return values for the keys whose conditions hold."""
        found: dict[str, Value] = {}
        for key, dimension in self.dimensions.items():
            if dimension.applies(found):
                found[key] = dimension.draw(key, trial)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what the file says."""
        return {key: one.model_dump(exclude_defaults=True, mode="json") for key, one in self.dimensions.items()}


def overrides_of(values: dict[str, Value]) -> list[str]:
    """Return values as they are typed after a run file."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def read_space(path: Path, check: Check) -> Space:
    """Read a space and check each of its keys, and the ends of its values. Raises UserError.

    `check` reads the run file with such options, as training does.
    """
    raw = read_json(path, what="space")
    raw.pop("$schema", None)
    if not raw:
        raise UserError(
            f'{path}: no keys to tune; write for example {{"optimizer.params.lr": {{"low": 1e-4, "high": 1e-2, '
            '"log": true}}'
        )
    dimensions = {key: _dimension(path, key, value) for key, value in raw.items()}
    for key, dimension in dimensions.items():
        _check_when(path, key, dimension, dimensions)
        for value in dimension.extremes:
            _check_value(path, {**_conditions(key, dimensions), key: value}, dimensions, check)
    return Space(dimensions)


def _conditions(key: str, dimensions: dict[str, Dimension]) -> dict[str, Value]:
    """Return what a key needs to be drawn: the values that its `when` names, and what their keys need."""
    found: dict[str, Value] = {}
    for name, value in dimensions[key].when.items():
        found |= {**_conditions(name, dimensions), name: value}
    return found


def _check_value(path: Path, values: dict[str, Value], dimensions: dict[str, Dimension], check: Check) -> None:
    """Refuse a value that the run file does not take, alone or with any values of the space's other keys."""
    try:
        check(overrides_of(values))
    except UserError as error:
        rng = random.Random(0)
        for _ in range(TRIES):
            found: dict[str, Value] = {}
            for key, dimension in dimensions.items():
                if dimension.applies(found):
                    found[key] = values[key] if key in values else rng.choice(dimension.extremes)
            try:
                check(overrides_of(found))
            except UserError:
                continue
            return
        raise UserError(f"{path}: {error}") from None


def _dimension(path: Path, key: str, value: Any) -> Dimension:
    section = next((name for name in NOT_TUNED if key == name or key.startswith(f"{name}.")), None)
    if section is not None:
        raise UserError(f"{path}: {key} is not tuned: {NOT_TUNED[section]}; remove it")
    if not isinstance(value, dict):
        choices = f'{{"choices": {json.dumps(value)}}}' if isinstance(value, list) else '{"low": ..., "high": ...}'
        raise UserError(f"{path}: {key} is {as_written(value)}; write {choices}")
    try:
        return Dimension(**value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"there is no such key{did_you_mean(name, list(Dimension.model_fields))}"
        elif isinstance(first["input"], str) and name in ("low", "high"):
            message = f"{json.dumps(first['input'])} is a text; write a number, without quotes"
        raise UserError(f"{path}: {key}: {f'{as_written(name)}: ' if name else ''}{message}") from None
    except TypeError:
        raise UserError(f"{path}: {key}: its keys are {', '.join(Dimension.model_fields)}") from None


def _check_when(path: Path, key: str, dimension: Dimension, dimensions: dict[str, Dimension]) -> None:
    before = list(dimensions)[: list(dimensions).index(key)]
    for name, value in dimension.when.items():
        if name not in before:
            meant = did_you_mean(name, before)
            raise UserError(f'{path}: {key}: "when" names {name}, which no key before it is{meant}')
        choices = dimensions[name].choices
        if choices is None or value not in choices:
            known = "has a range" if choices is None else f"has the choices {', '.join(map(json.dumps, choices))}"
            raise UserError(f'{path}: {key}: "when" wants {name}={json.dumps(value)}, which {known}')
