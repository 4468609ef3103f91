"""The options of the commands: a JSON file and key=value pairs become one frozen model."""

import codecs
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_tools.dedup.decontamination import DecontaminationConfig
from data_tools.dedup.lsh import DedupConfig
from data_tools.filters.rules import RulesConfig
from data_tools.option_types import Names, Paths
from megagpt.config.parsing import Strict
from megagpt.errors import UserError

Format = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "arrow", "warc", "html"]


class ReadConfig(Strict):
    """How the files of one source are read and which of its documents are kept."""

    format: Format = Field(default="auto", description="auto: by the file's name; anything else is text")
    text_field: str = Field(default="text", description="the field or column of JSON, CSV, Parquet and Arrow")
    include: Names = Field(default=(), description="in folders, only names like these: '*.py,*.md'")
    encoding: str = Field(default="utf-8", description="of text, JSON and CSV; auto: detect it")
    split_text_at: str = Field(default="", description="cut text files into documents after each of these")
    rules: RulesConfig = Field(default=RulesConfig(), description="cleaning and filters; see docs/data.md")

    @field_validator("encoding")
    @classmethod
    def _encoding_by_its_one_name(cls, name: str) -> str:
        """UTF-8, utf8 and u8 become utf-8."""
        if name == "auto":
            return name
        try:
            known = codecs.lookup(name).name
            b"a".decode(known)  # which codecs like hex and rot13 refuse
        except UnicodeDecodeError:
            return known  # as UTF-16, it is cut off
        except (LookupError, ValueError) as error:
            raise ValueError(f"{name!r} is no text encoding; give one that Python knows, such as latin-1") from error
        return known


class SourceConfig(ReadConfig):
    name: str = Field(min_length=1, description="what reports call it")
    paths: Paths = Field(min_length=1, description="files, folders, globs, or URLs like s3://bucket/a.jsonl")


class InputConfig(ReadConfig):
    sources: tuple[SourceConfig, ...] = Field(default=(), description="inputs with options of their own, by name")
    strict: bool = Field(default=False, description="stop at a record that cannot be read, rather than skip it")
    seed: int = Field(default=1234, ge=0, lt=2**63, description="of every draw: sample, splits, order, variants")
    workers: int | None = Field(default=None, ge=1, description="processes; all cores if not given")

    @model_validator(mode="before")
    @classmethod
    def _sources_inherit(cls, raw: Any) -> Any:
        """{"sources": {NAME: {...}}}: what a source does not say, it takes from the options beside it."""
        if not isinstance(raw, dict) or not raw.get("sources"):
            return raw
        if not isinstance(raw["sources"], dict):
            raise ValueError('sources is not an object of options by name: {"NAME": {"paths": [...]}, ...}')
        common = {key: raw[key] for key in ReadConfig.model_fields if key in raw}
        named = raw["sources"].items()
        sources = [common | {"name": n} | (s if isinstance(s, dict) else {"paths": s}) for n, s in named]
        return raw | {"sources": sources}

    def with_inputs(self, paths: Sequence[str]) -> tuple[SourceConfig, ...]:
        """The sources of the options, and one for each path of --input."""
        common = {key: getattr(self, key) for key in ReadConfig.model_fields}
        named = [SourceConfig(name=_name_of(path), paths=(path,), **common) for path in paths]
        if not (sources := (*self.sources, *named)):
            raise UserError('nothing to read; give --input PATH, or "sources" in --config')
        taken: dict[str, SourceConfig] = {}
        for source in sources:
            names = (source.name, *(f"{source.name}-{number}" for number in range(2, len(sources) + 2)))
            free = next(name for name in names if name not in taken)
            taken[free] = source.model_copy(update={"name": free})
        return tuple(taken.values())


class TokenizerConfig(InputConfig):
    tokenizer_type: Literal["unigram", "bpe", "char"] = "unigram"
    vocab_size: int = Field(default=32000, gt=0)
    sample_bytes: int = Field(default=8_000_000, gt=0, description="how much text it learns from")


TRAINING = set(TokenizerConfig.model_fields) - set(InputConfig.model_fields)


class SubwordConfig(Strict):
    """More tokenizations of the training split, which epochs take in turn (Kudo 2018; Provilkov et al. 2020)."""

    variants: int = Field(default=0, ge=0, le=63, description="besides the canonical one; 0: off")
    alpha: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="unigram: inverse temperature (0.3); bpe: share of dropped merges (0.1)",
    )

    @model_validator(mode="after")
    def _alpha_goes_with_variants(self) -> "SubwordConfig":
        if self.alpha is not None and not self.variants:
            raise ValueError(f"alpha={self.alpha} has no effect without variants; set subword.variants")
        return self


class BuildConfig(TokenizerConfig):
    tokenizer: Path | None = Field(default=None, description="a model to use instead of training one")
    dedup: DedupConfig = DedupConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    subword: SubwordConfig = SubwordConfig()
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

    @model_validator(mode="after")
    def _characters_have_no_variants(self) -> "BuildConfig":
        if self.subword.variants and self.tokenizer is None and self.tokenizer_type == "char":
            raise ValueError("subword.variants has no effect with tokenizer_type=char, which has one tokenization only")
        return self

    def pipeline(self, sources: Sequence[SourceConfig]) -> dict[str, Any]:
        """The options that decide what the shards hold. A given tokenizer is recorded by its hash instead."""
        idle = {"workers", "strict", "tokenizer", "sources", *ReadConfig.model_fields}
        idle |= TRAINING if self.tokenizer else set()
        each = [source.model_dump(mode="json", exclude={"paths"}) for source in sources]
        return self.model_dump(mode="json", exclude=idle) | {"sources": each}


def _name_of(path: str) -> str:
    return (Path(path).name if "://" in path else Path(path).absolute().name) or path


Config = TypeVar("Config", bound=InputConfig)


def load_config(model: type[Config], file: Path | None, overrides: Sequence[str]) -> Config:
    """`file` (JSON) and then `key.path=value` pairs, the later winning; every mistake names the key."""
    raw = _read_json(file) if file else {}
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not of the form key=value")
        _set(raw, path, _parse(text))
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_describe(problem, model) for problem in error.errors())) from error


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for depth, section in enumerate(sections, 1):
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            outer = ".".join(sections[:depth])
            raise UserError(f"{path} cannot be set beside {outer}={json.dumps(inner)}; give {outer} as an object")
        raw = inner
    raw[key] = value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read --config {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"--config {file} is not a JSON object of options")
    return raw


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _describe(problem: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), sorted(set(_keys(model))), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(model.model_fields)}"
        return f"unknown option {path!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(model: type[BaseModel]) -> Iterator[str]:
    """Every option's name, at any depth."""
    for name, field in model.model_fields.items():
        yield name
        for inner in _models_in(field.annotation):
            yield from _keys(inner)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
