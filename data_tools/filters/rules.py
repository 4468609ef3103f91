"""Apply the cleaning and quality rules to a text: the options, the verdict on one text, and a check before a build.

These are pure functions of text and options; reading, counting and writing are done by stages/extract.py.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from data_tools.filters.cleaning import CleanConfig, clean, line_dropper, switch_repairs
from data_tools.filters.language import LanguageConfig, language, load_language_model
from data_tools.filters.quality import (
    C4Config,
    FineWebConfig,
    GopherQualityConfig,
    c4,
    c4_lines,
    fineweb,
    gopher_quality,
)
from data_tools.filters.repetition import GopherRepetitionConfig, gopher_repetition
from data_tools.filters.text_statistics import TextStatistics
from data_tools.option_types import Names
from megagpt.config.parsing import Strict
from megagpt.errors import UserError

CustomRule = Callable[[str], bool | str | None]
"""A function of the user: False or a reason (str) rejects the text, True or None keeps it."""


SWITCHES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")  # rules that `true` switches on as published


class RulesConfig(Strict):
    """The rules that are on: in JSON, `true` (its published thresholds) or an object of the thresholds that differ."""

    clean: CleanConfig = Field(
        default=CleanConfig(), description="repairs and masks: true for all repairs of characters, or each by name"
    )
    gopher_quality: GopherQualityConfig | None = Field(
        default=None, description="true, or thresholds: length, symbols, bullets, stop words (English)"
    )
    gopher_repetition: GopherRepetitionConfig | None = Field(
        default=None, description="true, or thresholds: repeated lines, paragraphs, n-grams"
    )
    c4: C4Config | None = Field(
        default=None, description="true, or choices: drops lines that are not sentences; not for source code"
    )
    fineweb: FineWebConfig | None = Field(
        default=None, description="true, or thresholds: end punctuation, short and duplicate lines, lists"
    )
    language: LanguageConfig | None = Field(default=None, description="a fastText model, and the languages to keep")
    custom: Names = Field(
        default=(),
        description="functions 'package.module:function' of the text: False or a reason rejects, True or None keeps",
    )

    @field_validator(*SWITCHES, mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        return value

    @field_validator("language", mode="before")
    @classmethod
    def _switch_off(cls, value: Any) -> Any:
        return None if value is False else value

    _switch_repairs = field_validator("clean", mode="before")(switch_repairs)


class Verdict(NamedTuple):
    """The decision of the rules about one text."""

    text: str  # cleaned
    changed: tuple[str, ...]  # the cleaning steps that changed it
    rejected_by: str | None  # 'rule: why', one of a few strings that depend on the options alone


def apply_rules(text: str, cfg: RulesConfig) -> Verdict:
    """Clean a text, then apply the rules in the order of the options until one rejects it."""
    cleaned, changed = clean(text, cfg.clean)
    if changed and not cleaned.strip():
        return Verdict(cleaned, changed, "clean: nothing is left")
    stats = TextStatistics(cleaned)
    if cfg.gopher_quality and (why := gopher_quality(stats, cfg.gopher_quality)):
        return Verdict(cleaned, changed, f"gopher_quality: {why}")
    if cfg.gopher_repetition and (why := gopher_repetition(stats, cfg.gopher_repetition)):
        return Verdict(cleaned, changed, f"gopher_repetition: {why}")
    if cfg.c4:
        kept, why = c4(stats, cfg.c4)
        if why:
            return Verdict(cleaned, changed, f"c4: {why}")
        if kept != cleaned:
            cleaned, changed, stats = kept, (*changed, "c4"), TextStatistics(kept)
    if cfg.fineweb and (why := fineweb(stats, cfg.fineweb)):
        return Verdict(cleaned, changed, f"fineweb: {why}")
    if cfg.language and (why := language(cleaned, cfg.language)):
        return Verdict(cleaned, changed, f"language: {why}")
    for path in cfg.custom:
        if why := _custom(cleaned, path):
            return Verdict(cleaned, changed, why)
    return Verdict(cleaned, changed, None)


def clean_only(text: str, cfg: RulesConfig) -> Verdict:
    """Clean a later piece of a long document, whose verdict depends on its first piece."""
    cleaned, changed = clean(text, cfg.clean)
    if cfg.c4 and (kept := c4_lines(cleaned, cfg.c4)) != cleaned:
        cleaned, changed = kept, (*changed, "c4")
    return Verdict(cleaned, changed, None)


def check_rules(cfg: RulesConfig) -> None:
    """Raise UserError for options that cannot work, before a build starts."""
    line_dropper(cfg.clean)
    if cfg.language:
        load_language_model(cfg.language.model)
    for path in cfg.custom:
        load_custom(path)


def _custom(text: str, path: str) -> str | None:
    """Return why a custom rule rejects the text, or None. Raises UserError if the function fails."""
    rule = load_custom(path)
    try:
        verdict = rule(text)
    except Exception as error:
        raise UserError(f"custom rule {path} failed with {type(error).__name__}: {error}; repair it") from error
    if verdict is None or verdict is True:
        return None
    if verdict is False:
        return f"custom: {path}"
    if isinstance(verdict, str):
        return f"custom: {path}: {verdict}"
    raise UserError(
        f"custom rule {path} returned {verdict!r}; return True or None to keep, False or a reason to reject"
    )


@lru_cache(maxsize=64)
def load_custom(path: str) -> CustomRule:
    """Return the function at 'package.module:function' or 'package.module.function'. Raises UserError."""
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise UserError(f"rules.custom={path!r} does not name a function; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise UserError(
            f"rules.custom={path!r}: cannot import {module_name} ({type(error).__name__}: {error}); "
            "repair or install it"
        ) from error
    rule: CustomRule | None = getattr(module, name, None)
    if not callable(rule):
        raise UserError(f"rules.custom={path!r}: {module_name} has no function {name!r}")
    return rule
