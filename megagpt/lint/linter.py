"""Check every key of a run file: unknown, removed from DeepSpeed, without effect in this run, or against another key.

`lint_file` reports everything about a file, for `megagpt lint`. `lint_or_raise` checks a run that has been parsed, for
the commands that are about to use it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError

from megagpt.config.batch import BatchPlan, batch_plan, check_first_batch, rank_numbers
from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.deepspeed_keys import REFUSED_KEYS
from megagpt.config.extends import merged, read_run_files
from megagpt.config.length import with_steps
from megagpt.config.mistakes import (
    IN_QUOTES,
    as_written,
    is_quoted,
    mistakes,
    no_section,
    only_key,
    unknown_key,
    without_consequences,
)
from megagpt.config.parsing import dotted_items, overridden
from megagpt.config.run_file import KEYS, SECTION, RunConfig, auto_values, no_own_section, parse_run
from megagpt.config.schema import MegaGPTConfig
from megagpt.engine.activation_checkpointing import refuse_what_cannot_act
from megagpt.engine.deepspeed_config import check_deepspeed_keys, effective_config
from megagpt.engine.deepspeed_models import REMOVED_KEYS, SECTION_MODELS
from megagpt.errors import UserError
from megagpt.lint.deepspeed_rules import DEEPSPEED_CONTRADICTIONS, DEEPSPEED_WITHOUT_EFFECT
from megagpt.lint.deepspeed_sections import deepspeed_sections
from megagpt.lint.refused import ERRORS
from megagpt.lint.rules import CONTRADICTIONS, DEFAULTS, WITHOUT_EFFECT

# A run file is written for GPUs, on whatever machine it is checked.
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Issue:
    """One thing to change, or to know, about a dotted key of the run file."""

    level: Literal["error", "warning", "note"]
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def lint_file(path: Path, overrides: Sequence[str] = (), *, ranks: int | None = None) -> list[Issue]:
    """Return all findings on a run file, or only its errors if it has any. Raises UserError if it is no JSON object."""
    raw = overridden(merged(read_run_files(path)), overrides)
    errors = _first_per_key(list(_all_errors(raw)))
    if errors:
        found = without_consequences((issue.key, issue.text) for issue in errors)
        return [Issue("error", key, text) for key, text in found]
    try:
        run = parse_run(raw)
        batch = _batch(run.deepspeed, ranks)
        if ranks:
            check_first_batch(run.megagpt.schedule, batch)
        errors = [finding for finding in lint(run) if finding.level == "error"]
        if not errors:
            # On one rank DeepSpeed needs no process group to check its sections against each other.
            alone = BatchPlan(batch.global_batch, batch.micro_batch, batch.global_batch // batch.micro_batch, 1)
            check_deepspeed_keys(effective_config(run.changed("gradient_accumulation_steps=null"), alone, 50304, GPU))
    except UserError as error:
        return _first_per_key([*errors, _finding_of(error)])
    return errors or [*lint(run), *notes(run)]


def lint(run: RunConfig) -> list[Issue]:
    """Return the errors, or if there are none the warnings, about a run file that has been parsed."""
    found = [*_deepspeed_errors(run.deepspeed_raw)]
    try:
        refuse_what_cannot_act(run.megagpt, run.deepspeed, GPU, compiled=run.megagpt.compile is not False)
    except UserError as error:
        found.append(_finding_of(error))
    found += _refused(run)
    if not found:
        found += [*_renamed(run), *_switched_off(run), *_idle(run), *_contradicting(run)]
    return _first_per_key(found)


def lint_or_raise(run: RunConfig) -> list[str]:
    """Return the warnings about a run, to be printed; raise UserError with all errors. The same on every rank."""
    found = lint(run)
    if errors := [finding.text for finding in found if finding.level == "error"]:
        raise UserError("; ".join(errors))
    return [str(finding) for finding in found]


def notes(run: RunConfig) -> Iterator[Issue]:
    """Name the keys that the file leaves out although their default matters."""
    ours = run.megagpt.model_dump(mode="json", exclude_unset=True)
    written = dict(dotted_items(run.deepspeed_raw)) | dict(dotted_items(ours, SECTION))
    for key, (when, what) in DEFAULTS.items():
        if key not in written and when(run):
            yield Issue("note", key, f"{key} is left out: {what}")


def effective(run: RunConfig, vocab_size: int, ranks: int | None = None) -> dict[str, Any]:
    """Return the run file as it acts: gaps filled as the engine fills them, the defaults that act written out."""
    batch = _batch(run.deepspeed, ranks)
    return run.written_out({**run.as_json(), **effective_config(run, batch, vocab_size, GPU)})


def _batch(ds: DeepSpeedConfig, ranks: int | None) -> BatchPlan:
    """Divide the global batch over these ranks, or those that the file implies by its gradient accumulation, or one."""
    if ranks:
        return batch_plan(ds, ranks, rank_numbers(ranks, "give --ranks {}"))
    per_pass = ds.train_micro_batch_size_per_gpu * (ds.gradient_accumulation_steps or 1)
    replicas = max(1, ds.train_batch_size // per_pass) if ds.gradient_accumulation_steps else 1
    return batch_plan(ds, replicas * ds.sequence_parallel_size)


# --- errors ---------------------------------------------------------------------------------------------------


def _finding_of(error: ValueError) -> Issue:
    """Make an error of a message, which begins with the key that it is about."""
    text = str(error).removeprefix("run file: ")
    return Issue("error", re.split(r"[=\s:]", text)[0], text)


def _all_errors(raw: dict[str, Any]) -> Iterator[Issue]:
    """Find all errors of DeepSpeed's part and of ours in a run file's object; parse_run stops at the first kind."""
    for key, text in auto_values(raw).items():
        yield Issue("error", key, text)
    ours = {key: value for key, value in raw.items() if key != SECTION}
    yield from _deepspeed_errors(ours)
    for model, given, section in ((DeepSpeedConfig, ours, ""), (MegaGPTConfig, raw.get(SECTION), SECTION)):
        if not isinstance(given, dict):
            yield Issue("error", section, no_own_section(raw))
            continue
        try:
            given = with_steps(given, ours) if section else given
        except ValueError as error:
            yield _finding_of(error)
            continue
        yield from _refused_by(model, given, section)


def _deepspeed_errors(raw: dict[str, Any]) -> Iterator[Issue]:
    """Check DeepSpeed's part of a run file: its keys by our lists, then the values of typed sections by its models."""
    yield from _wrong_keys("", raw)
    for name, model in SECTION_MODELS.items():
        given = _section_at(raw, name)
        clean = {key: value for key, value in given.items() if key in deepspeed_sections()[name].defaults}
        for finding in _refused_by(model, clean, name):
            if "unknown key" not in finding.text:  # found above, with its nearest name
                yield finding


def _wrong_keys(section: str, given: dict[str, Any]) -> Iterator[Issue]:
    """Find keys that are removed, refused or unknown, and values of a wrong type, in a section and in those inside."""
    sections = deepspeed_sections()
    known = sections[section].defaults
    for key, value in given.items():
        dotted = f"{section}.{key}" if section else key
        if dotted in REMOVED_KEYS:
            ours = f" Here: {REFUSED_KEYS[dotted]}" if dotted in REFUSED_KEYS else ""
            why = f"{dotted} was removed from DeepSpeed: {REMOVED_KEYS[dotted].strip()}{ours}"
            yield Issue("error", dotted, f"{why} Remove it")
        elif dotted in REFUSED_KEYS:
            yield Issue("error", dotted, f"{dotted!r} is not supported: {REFUSED_KEYS[dotted]}")
        elif key not in known:
            names = {*known} if section else {*known, SECTION}
            yield Issue("error", dotted, unknown_key(only_key(dotted, value), names, KEYS))
        elif dotted in sections and isinstance(value, dict):
            yield from _wrong_keys(dotted, value)
        elif dotted in sections:
            yield Issue("error", dotted, no_section(dotted, value, sections[dotted].defaults))
        elif right := _right_type(known[key], value):
            text = f"{dotted}={as_written(value)} is not {right}"
            yield Issue("error", dotted, IN_QUOTES.format(dotted, as_written(value)) if is_quoted(value) else text)


def _right_type(default: Any, value: Any) -> str:
    """Name the type that a value should have by its key's default; "" if it has that type or the default tells none."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    return ""


def _refused_by(model: type[BaseModel], given: dict[str, Any], section: str) -> Iterator[Issue]:
    """Find what a pydantic model has against the section given to it."""
    try:
        model(**given)
    except ValidationError as error:
        for key, text in mistakes(error, model, section=section, elsewhere=KEYS):
            yield Issue("error", key, text)
    except (ValueError, AssertionError) as error:
        yield Issue("error", section, f"{section}: {error}")


def _refused(run: RunConfig) -> Iterator[Issue]:
    """Find the keys with values that training refuses."""
    for key, value in _written(run):
        for rule in ERRORS:
            if fnmatchcase(key, rule.key) and rule.when(run, value):
                yield Issue("error", key, f"{key}={json.dumps(value)} {rule.why}")


# --- warnings -------------------------------------------------------------------------------------------------


def _renamed(run: RunConfig) -> Iterator[Issue]:
    """Find keys that the installed DeepSpeed deprecates, and keys that are given under both of their names."""
    for section, (given, model) in _typed_sections(run).items():
        for name, info in model.model_fields.items():
            key = f"{section}.{name}"
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if name in given and extra.get("deprecated"):
                way_out = f"write {extra['new_param']}" if extra.get("new_param") else "remove it"
                yield Issue("warning", key, f"{key} is deprecated by the installed DeepSpeed; {way_out}")
            if info.alias and info.alias != name and {name, info.alias} <= set(given):
                yield Issue("warning", key, f"{key} and {info.alias} are one key; remove {name}")


def _switched_off(run: RunConfig) -> Iterator[Issue]:
    """Find sections that have settings but do not set `enabled`, which is false by default."""
    for name, section in deepspeed_sections().items():
        given = _section_at(run.deepspeed_raw, name) if name else {}
        if given and "enabled" not in given and section.defaults.get("enabled") is False:
            yield Issue(
                "warning", name, f"{name} has no effect: {name}.enabled is false unless set; set {name}.enabled to true"
            )


def _idle(run: RunConfig) -> Iterator[Issue]:
    """Find keys that have no effect in this run; of several reasons the first in the tables is given."""
    for key, value in _written(run):
        # A section acts by its keys; `stage`, and a device of "none", are what switches other keys off.
        if isinstance(value, dict) or key.endswith(".stage") or (key.endswith(".device") and value == "none"):
            continue
        rules = [
            rule
            for rule in (*DEEPSPEED_WITHOUT_EFFECT, *WITHOUT_EFFECT)
            if any(fnmatchcase(key, pattern) for pattern in rule.keys)
        ]
        if idle := next((rule for rule in rules if not rule.when(run)), None):
            yield Issue("warning", key, f"{key}={json.dumps(value)} has no effect: {idle.why}")


def _contradicting(run: RunConfig) -> Iterator[Issue]:
    for key, value in _written(run):
        for rule in (*DEEPSPEED_CONTRADICTIONS, *CONTRADICTIONS):
            if rule.key == key and rule.when(run):
                yield Issue("warning", key, f"{key}={json.dumps(value)} {rule.why}")


def _written(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """DeepSpeed's keys that the file has, and ours that differ from their defaults."""
    yield from dotted_items(run.deepspeed_raw)
    yield from dotted_items(run.megagpt.model_dump(mode="json", exclude_defaults=True), SECTION)


def _typed_sections(run: RunConfig) -> dict[str, tuple[dict[str, Any], type[BaseModel]]]:
    """Return the sections that DeepSpeed has a model of -> (what the file has there, the model)."""
    typed = {name: section.model for name, section in deepspeed_sections().items() if section.model is not None}
    return {name: (_section_at(run.deepspeed_raw, name), model) for name, model in typed.items()}


def _section_at(raw: dict[str, Any], dotted: str) -> dict[str, Any]:
    """Return the section of this dotted name; an empty one if the file has none there."""
    node: Any = raw
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _first_per_key(found: list[Issue]) -> list[Issue]:
    return list({finding.key: finding for finding in reversed(found)}.values())[::-1]
