"""The options of the data_tools commands: a JSON file and key=value pairs, checked, as one frozen model."""

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from data_tools.dedup.decontamination import DecontaminationConfig
from data_tools.dedup.lsh import DedupConfig
from data_tools.filters.rules import SWITCHES, RulesConfig
from data_tools.option_types import Names, Paths
from megagpt.config.mistakes import as_written, explain
from megagpt.config.parsing import Strict, UserPath, overridden, read_json, unescaped
from megagpt.data.manifest import Split
from megagpt.errors import UserError
from megagpt.terminal import builder_command

MOST_PIECES = 2**24  # of a vocabulary; SentencePiece counts in 32 bits
ChatTemplate = Literal["chatml", "llama3", "plain"]

MAX_SOURCES = 2**16  # rows of shards number them in 16 bits


class ReadConfig(Strict):
    """Options for reading the files of one source, and for keeping its documents."""

    format: str = Field(
        default="auto",
        description="text, jsonl, json, csv, tsv, parquet, arrow, html, warc; auto: by the file's name, or text",
    )
    text_field: str = Field(default="text", description="the field or column; nested ones by path: data.text")
    include: Names = Field(default=(), description="in folders, only file names that match: '*.py,*.md'")
    chat_template: ChatTemplate | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=f"how to write out a list of chat messages: {', '.join(get_args(ChatTemplate))}",
    )
    encoding: str = Field(default="utf-8", description="of text, JSON and CSV; auto: detect it")
    split_text_at: str = Field(default="", description=r"cut text files into documents after each: '\n\n'")
    rules: RulesConfig = Field(default=RulesConfig(), description="cleaning and filters; see docs/data.md")
    # Options that are newer than a dataset leave no trace at their default: its build resumes, its bytes do not change.
    splits: Literal["by-hash", "by-name"] = Field(
        default="by-hash",
        exclude_if=lambda value: value == "by-hash",
        description="by-name: train, val, valid, validation, dev and test in file and folder names",
    )

    @field_validator("encoding")
    @classmethod
    def _encoding_by_its_one_name(cls, name: str) -> str:
        """Turn an alias (UTF-8, utf8, u8) into the codec's own name. Raises ValueError for what is not text."""
        if name == "auto":
            return name
        try:
            known = codecs.lookup(name).name
            b"a".decode(known)  # codecs such as hex and rot13 refuse this
        except UnicodeDecodeError:
            return known  # a text encoding of which one byte is not a whole character, such as UTF-16
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"{as_written(name)} is not a text encoding; give one that Python knows, such as latin-1"
            ) from error
        return known


class SourceConfig(ReadConfig):
    """One source: files that are read with the same options and reported together."""

    name: str = Field(min_length=1, description="what reports call it")
    paths: Paths = Field(min_length=1, description="files, folders, globs, or URLs like s3://bucket/a.jsonl")
    split: Split | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="train, val or test: where all of its documents go",
    )


class InputConfig(ReadConfig):
    """Options shared by all commands that read text."""

    sources: tuple[SourceConfig, ...] = Field(default=(), description="by name: inputs with options of their own")
    strict: bool = Field(default=False, description="stop at a record that cannot be read, rather than skip it")
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="of the random choices: sample, splits, order, variants"
    )
    workers: int | None = Field(default=None, ge=1, le=4096, description="processes; null: one per core")

    @model_validator(mode="before")
    @classmethod
    def _sources_inherit(cls, raw: Any) -> Any:
        """Fill in each source of {"sources": {NAME: {...}}} what it leaves out, from the options of all sources."""
        if not isinstance(raw, dict) or not raw.get("sources"):
            return raw
        if not isinstance(raw["sources"], dict):
            raise ValueError('sources is not an object of options by name; write {"NAME": {"paths": [...]}, ...}')
        common = {key: raw[key] for key in ReadConfig.model_fields if key in raw}
        named = raw["sources"].items()
        sources = [common | {"name": n} | (s if isinstance(s, dict) else {"paths": s}) for n, s in named]
        return raw | {"sources": sources}

    def with_inputs(
        self, paths: Sequence[str], *, val: Sequence[str] = (), test: Sequence[str] = ()
    ) -> tuple[SourceConfig, ...]:
        """Return the sources of the options, then one for each path of --input, --val and --test.

        Equal names get a number.
        """
        for split, its_paths in (("val", val), ("test", test)):
            if fraction := next((path for path in its_paths if _is_fraction(path)), None):
                raise UserError(f"--{split} {fraction} is no file; for a fraction, set {split}_fraction={fraction}")
        if (n := len(self.sources) + len(paths) + len(val) + len(test)) > MAX_SOURCES:
            raise UserError(
                f"{n:,} inputs are more than the {MAX_SOURCES:,} sources of a dataset; give their folder instead, or a "
                "pattern in quotes, which is one source"
            )
        common = {key: getattr(self, key) for key in ReadConfig.model_fields}
        given: dict[Split | None, Sequence[str]] = {None: paths, "val": val, "test": test}
        named = [
            SourceConfig(name=_name_of(path), paths=(path,), split=split, **common)
            for split, its_paths in given.items()
            for path in its_paths
        ]
        if not (sources := (*self.sources, *named)):
            raise UserError('there is nothing to read; give --input PATH, or "sources" in --config')
        taken: dict[str, SourceConfig] = {}
        last = dict.fromkeys((source.name for source in sources), 1)  # the number that was tried last
        for source in sources:
            name = source.name
            while name in taken:
                last[source.name] += 1
                name = f"{source.name}-{last[source.name]}"
            taken[name] = source.model_copy(update={"name": name})
        return tuple(taken.values())


class TokenizerConfig(InputConfig):
    """The `train-tokenizer` command's options."""

    tokenizer_type: Literal["unigram", "bpe", "char"] = Field(
        default="unigram", description="of the tokenizer that is trained: unigram, bpe or char"
    )
    vocab_size: int = Field(default=32000, gt=0, le=MOST_PIECES, description="its number of pieces")
    sample_bytes: int = Field(default=8_000_000, gt=0, le=10**15, description="size of the text that it is trained on")


TRAINING = set(  # the options that a given tokenizer leaves without effect
    TokenizerConfig.model_fields
) - set(InputConfig.model_fields)


class SubwordConfig(Strict):
    """Subword regularization: sampled tokenizations of the training split, one per epoch in turn.

    Kudo 2018 for unigram models, Provilkov et al. 2020 (BPE-dropout) for bpe.
    """

    variants: int = Field(default=0, ge=0, le=63, description="tokenizations besides the canonical one; 0: off")
    alpha: float | None = Field(
        default=None,
        ge=1e-6,
        le=1.0,
        description="unigram: inverse temperature (0.3); bpe: share of dropped merges (0.1)",
    )

    @model_validator(mode="after")
    def _alpha_goes_with_variants(self) -> "SubwordConfig":
        if self.alpha is not None and not self.variants:
            raise ValueError(f"subword.alpha={self.alpha} has no effect without variants; set subword.variants")
        return self


class BuildConfig(TokenizerConfig):
    """The `build` command's options."""

    tokenizer: UserPath | None = Field(
        default=None, description="a SentencePiece model or tokenizer.json to use, none is trained"
    )
    dedup: DedupConfig = DedupConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    subword: SubwordConfig = SubwordConfig()
    val_fraction: float = Field(default=0.01, ge=0.0, le=1.0, description="of the documents that no input assigns")
    test_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="of the documents that no input assigns")
    shard_tokens: int = Field(
        default=2**28, gt=0, le=10**15, description="tokens per shard, roughly: 512 MiB of 16-bit ids"
    )

    @model_validator(mode="after")
    def _fractions_are_of_one_whole(self) -> "BuildConfig":
        if self.val_fraction + self.test_fraction > 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} are more than all documents; "
                f"set test_fraction={max(0.0, round(1 - self.val_fraction, 9)):g} or less"
            )
        return self

    @field_validator("tokenizer")
    @classmethod
    def _is_no_type(cls, path: Path | None) -> Path | None:
        if path is not None and str(path) in ("unigram", "bpe", "char") and not path.exists():
            raise ValueError(f"tokenizer={path} is not a file; write tokenizer_type={path} to train one of this type")
        return path

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
        """Return the options on which the shards depend, for the manifest; a given tokenizer is named by its hash."""
        idle = {"workers", "strict", "tokenizer", "sources", *ReadConfig.model_fields}
        idle |= TRAINING if self.tokenizer else set()
        each = [source.model_dump(mode="json", exclude={"paths"}) for source in sources]
        return self.model_dump(mode="json", exclude=idle) | {"sources": each}


def _is_fraction(path: str) -> bool:
    return re.fullmatch(r"[01]?\.\d+|[01]", path) is not None and not Path(path).exists()


def _name_of(path: str) -> str:
    """Return a source's name in reports: the last part of its path."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]  # what follows may be a signature, which changes from day to day
    return (Path(path).name if "://" in path else Path(path).absolute().name) or path


Config = TypeVar("Config", bound=InputConfig)


def _with_escapes(item: str) -> str:
    """Return an override of split_text_at with the escapes replaced that a shell passes on, unless it is JSON text."""
    key, sep, value = item.partition("=")
    if not sep or key.rpartition(".")[2] != "split_text_at" or value.startswith('"'):
        return item
    return f"{key}={json.dumps(unescaped(value))}"


def _without_switches(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the overrides without `rules.c4=true` where another sets a threshold of that rule, which switches it on.

    A rule that `raw` switches on becomes a section, for the same reason.
    """
    on = {f"rules.{name}": name for name in SWITCHES}
    changed = on.keys() & {item.partition("=")[0].rpartition(".")[0] for item in overrides}
    for key in changed:
        if isinstance(rules := raw.get("rules"), dict) and rules.get(on[key]) is True:
            rules[on[key]] = {}
    return [item for item in overrides if item not in {f"{key}=true" for key in changed}]


def load_config(model: type[Config], file: Path | None, overrides: Sequence[str]) -> Config:
    """Return the options of a JSON file and then from `key.path=value` pairs, which override it.

    Raises UserError with every mistake, each with its dotted key, the value seen and what is right.
    """
    raw = read_json(file, what="--config") if file else {}
    raw = overridden(raw, [_with_escapes(item) for item in _without_switches(raw, overrides)])
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        names = list(raw["sources"]) if isinstance(raw.get("sources"), dict) else []
        message = _with_names(explain(error, model, section=""), names)
        more = f" (`{builder_command()} build --help` describes each)" if "a key of it: " in message else ""
        raise UserError(message + more) from error


def _with_names(message: str, names: Sequence[str]) -> str:
    """Return a message in which sources have their names, rather than the numbers that _sources_inherit gives them."""
    return re.sub(r"\bsources\.(\d+)(?=\b)", lambda found: f"sources.{names[int(found[1])]}", message)
