"""The options of `build` and `train-tokenizer`: a JSON file and key=value pairs become one frozen model."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from megagpt.config import Strict
from megagpt.errors import UserError


class ReadConfig(Strict):
    text_field: str = Field(default="text", description="the field or column of JSON lines and Parquet")
    include: tuple[str, ...] = Field(default=(), description="in folders, only names like these: '*.py,*.md'")
    split_text_at: str = Field(default="", description="cut text files into documents after each of these")
    strict: bool = Field(default=False, description="stop at a record that cannot be read, rather than skip it")
    seed: int = 1234
    workers: int | None = Field(default=None, ge=1, description="processes; all cores if not given")

    @field_validator("include", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value


class TokenizerConfig(ReadConfig):
    tokenizer_type: Literal["unigram", "bpe", "char"] = "unigram"
    vocab_size: int = Field(default=32000, gt=0)
    sample_bytes: int = Field(default=8_000_000, gt=0, description="how much text it learns from")


TRAINING = set(TokenizerConfig.model_fields) - set(ReadConfig.model_fields)


class BuildConfig(TokenizerConfig):
    tokenizer: Path | None = Field(default=None, description="a model to use instead of training one")
    val_fraction: float = Field(default=0.01, ge=0.0, lt=1.0, description="of the documents")
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="of the documents")
    shard_tokens: int = Field(default=2**28, gt=0, description="about this many per shard: 512 MiB of 16-bit ids")

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> "BuildConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} leave nothing to train"
            )
        return self

    @model_validator(mode="after")
    def _a_given_tokenizer_is_not_trained(self) -> "BuildConfig":
        idle = TRAINING & self.model_fields_set
        if self.tokenizer is not None and idle:
            raise ValueError(f"{sorted(idle)[0]} has no effect with tokenizer={self.tokenizer}; remove one of the two")
        return self

    def pipeline(self) -> dict[str, Any]:
        """The options that decide what the shards hold. A given tokenizer is recorded by its hash instead."""
        idle = {"workers", "strict", "tokenizer"} | (TRAINING if self.tokenizer else set())
        return self.model_dump(mode="json", exclude=idle)


Config = TypeVar("Config", bound=ReadConfig)


def load_config(model: type[Config], file: Path | None, overrides: Sequence[str]) -> Config:
    """`file` (JSON) and then `key=value` pairs, the later winning; every mistake names the key."""
    raw = _read_json(file) if file else {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not of the form key=value")
        raw[key] = _parse(text)
    for key in raw:
        if key not in model.model_fields:
            near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(model.model_fields)}"
            raise UserError(f"unknown option {key!r}; {hint}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_describe(problem) for problem in error.errors())) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read --config {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"--config {file} is not a JSON object of options")
    return raw


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _describe(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    return f"{problem['loc'][0]}={problem['input']!r}: {message[0].lower()}{message[1:]}"
