"""Every key of a run file looked at: unknown, removed from DeepSpeed, without effect here, or against another."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError

from megagpt.config.batch import BatchPlan, batch_plan
from megagpt.config.deepspeed import DEEPSPEED_KEYS, REFUSED_KEYS, DeepSpeedConfig
from megagpt.config.parsing import as_written, did_you_mean, mistakes, overridden, read_json
from megagpt.config.run_file import SECTION, RunConfig, parse_run
from megagpt.config.schema import MegaGPTConfig
from megagpt.engine.activation_checkpointing import refuse_what_cannot_act
from megagpt.engine.deepspeed_config import KEPT_FROM_DEEPSPEED, ConfigReader, check_deepspeed_keys, effective_config
from megagpt.errors import UserError
from megagpt.lint.deepspeed_keys import Known, Place, known_to
from megagpt.lint.rules import CONTRADICTIONS, DEFAULTS, WITHOUT_EFFECT

GPU = torch.device("cuda")  # what a run file is written for, wherever it is looked at


@dataclass(frozen=True)
class Finding:
    level: Literal["error", "warning", "note"]
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def lint_file(path: Path, overrides: Sequence[str] = (), *, ranks: int | None = None) -> list[Finding]:
    """All findings on a run file, the errors alone if it has any. Raises UserError if it is not a JSON object."""
    raw = overridden(read_json(path), overrides)
    errors = list(_errors_of(raw))
    if errors:
        return _once(errors)
    try:
        run = parse_run(raw)
        batch = batch_plan(run.deepspeed, ranks) if ranks else any_batch(run.deepspeed)
        errors = [finding for finding in lint(run) if finding.level == "error"]
        if not errors:
            alone = BatchPlan(batch.global_batch, batch.micro_batch, batch.global_batch // batch.micro_batch, 1)
            check_deepspeed_keys(effective_config(run, alone, 50304, GPU))
    except UserError as error:
        return _once([*errors, _from(error)])
    return errors or [*lint(run), *notes(run)]


def lint(run: RunConfig) -> list[Finding]:
    """Errors and warnings about a run file that has been parsed."""
    found = [*_deepspeed_errors(run.deepspeed_raw)]
    try:
        refuse_what_cannot_act(run.megagpt, run.deepspeed, GPU, compiled=run.megagpt.compile is not False)
    except UserError as error:
        found.append(_from(error))
    if run.deepspeed.bf16.enabled and run.deepspeed.fp16.enabled:
        found.append(Finding("error", "fp16.enabled", "fp16.enabled and bf16.enabled are both true; choose one"))
    if run.deepspeed.fp16.enabled and run.deepspeed.zero_optimization.stage == 0:
        text = "fp16.enabled=true at zero_optimization.stage=0: DeepSpeed divides the gradients by a loss scale "
        text += "that it did not multiply the loss by; set zero_optimization.stage to 1"
        found.append(Finding("error", "fp16.enabled", text))
    if not found:
        found += [*_changed(run), *_switched_off(run), *_idle(run), *_contradicting(run)]
    return _once(found)


def lint_or_raise(run: RunConfig) -> list[str]:
    """The warnings about a run, to be printed; raises UserError with all errors. The same on every rank."""
    found = lint(run)
    if errors := [finding.text for finding in found if finding.level == "error"]:
        raise UserError("; ".join(errors))
    return [str(finding) for finding in found]


def notes(run: RunConfig) -> Iterator[Finding]:
    """What the file leaves out and should not be left to chance."""
    written = dict(_nodes(run.deepspeed_raw)) | {f"{SECTION}.{key}": v for key, v in _set(run.megagpt)}
    for key, (when, what) in DEFAULTS.items():
        if key not in written and when(run):
            yield Finding("note", key, f"{key} is left out: {what}")


def effective(run: RunConfig, vocab_size: int, ranks: int | None = None) -> dict[str, Any]:
    """The run file as it will act: what it leaves out filled as the engine does, our defaults written out."""
    batch = batch_plan(run.deepspeed, ranks) if ranks else any_batch(run.deepspeed)
    return {**run.as_json(), **effective_config(run, batch, vocab_size, GPU)}


def any_batch(ds: DeepSpeedConfig) -> BatchPlan:
    """The batch arithmetic on as many ranks as the file itself implies: by its accumulation, else as few as can be."""
    per_pass = ds.train_micro_batch_size_per_gpu * (ds.gradient_accumulation_steps or 1)
    replicas = max(1, ds.train_batch_size // per_pass) if ds.gradient_accumulation_steps else 1
    return batch_plan(ds, replicas * ds.sequence_parallel_size)


# --- errors ---------------------------------------------------------------------------------------------------


def _from(error: UserError) -> Finding:
    """Messages begin with the key."""
    text = str(error).removeprefix("run file: ")
    return Finding("error", re.split(r"[=\s:]", text)[0], text)


def _errors_of(raw: dict[str, Any]) -> Iterator[Finding]:
    """Of the object as it was read. DeepSpeed's and ours; all of them, where parse_run stops at the first kind."""
    ours = {key: value for key, value in raw.items() if key != SECTION}
    yield from _deepspeed_errors(ours)
    for model, given, section in ((DeepSpeedConfig, ours, ""), (MegaGPTConfig, raw.get(SECTION), SECTION)):
        if not isinstance(given, dict):
            yield Finding("error", section, f'"{section}" is not a section {{...}}; see ds_configs/README.md')
            continue
        yield from _refused_by(model, given, section)


def _refused_by(model: type[BaseModel], given: dict[str, Any], section: str) -> Iterator[Finding]:
    try:
        model(**given)
    except ValidationError as error:
        for key, text in mistakes(error, model, section=section):
            yield Finding("error", key, text)
    except (ValueError, AssertionError) as error:
        yield Finding("error", section, f"{section}: {error}")


def _deepspeed_errors(raw: dict[str, Any]) -> Iterator[Finding]:
    known = known_to(ConfigReader)
    yield from _unknown(known, raw, ())
    for place, model in known.classes.items():
        given = _at(raw, place)
        if place[:-1] in known.classes or place[0] in REFUSED_KEYS or place[0] in KEPT_FROM_DEEPSPEED:
            continue
        if isinstance(given, dict):
            clean = {key: value for key, value in given.items() if key in known.keys[place]}
            for finding in _refused_by(model, clean, ".".join(place)):
                if "unknown key" not in finding.text:  # found above, with its nearest name
                    yield finding


def _unknown(known: Known, raw: dict[str, Any], place: Place) -> Iterator[Finding]:
    allowed = known.keys.get(place, set())
    for key, value in raw.items():
        dotted = ".".join((*place, key))
        if dotted in known.removed:
            why = f"{dotted} was removed from DeepSpeed: {known.removed[dotted].strip()}"
            ours = f" Here: {REFUSED_KEYS[key]}" if not place and key in REFUSED_KEYS else ""
            yield Finding("error", dotted, f"{why}{ours} Remove it")
        elif not place and key in REFUSED_KEYS:
            yield Finding("error", key, f"{key!r} cannot act here: {REFUSED_KEYS[key]}")
        elif not place and key not in DEEPSPEED_KEYS:
            yield Finding("error", key, f"unknown key {key!r}{did_you_mean(key, DEEPSPEED_KEYS | {SECTION})}")
        elif allowed and key not in allowed and place[:1] not in {(name,) for name in KEPT_FROM_DEEPSPEED}:
            yield Finding("error", dotted, f"unknown key {dotted!r}{did_you_mean(key, allowed)}")
        elif isinstance(value, dict) and (*place, key) in known.keys:
            yield from _unknown(known, value, (*place, key))
        elif right := _right_type(known, place, key, value):
            yield Finding("error", dotted, f"{dotted}={as_written(value)} is not {right}")


def _right_type(known: Known, place: Place, key: str, value: Any) -> str:
    """What a value without a class to check it should be, if it is not."""
    default = known.default(place, key)
    if (*place, key) in known.keys:
        return "a section {...}"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    return ""


# --- warnings -------------------------------------------------------------------------------------------------


def _changed(run: RunConfig) -> Iterator[Finding]:
    """Keys that the installed DeepSpeed deprecates, and keys given under two names."""
    for place, model in known_to(ConfigReader).classes.items():
        given = _at(run.deepspeed_raw, place)
        for name, info in model.model_fields.items() if isinstance(given, dict) else ():
            key = ".".join((*place, name))
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if name in given and extra.get("deprecated"):
                way_out = f"write {extra['new_param']}" if extra.get("new_param") else "remove it"
                yield Finding("warning", key, f"{key} is deprecated by the installed DeepSpeed; {way_out}")
            if info.alias and info.alias != name and {name, info.alias} <= set(given):
                yield Finding("warning", key, f"{key} and {info.alias} are one key; remove {name}")


def _switched_off(run: RunConfig) -> Iterator[Finding]:
    """Sections that say how, but not that they are on."""
    known = known_to(ConfigReader)
    for place, keys in known.keys.items():
        given = _at(run.deepspeed_raw, place)
        if place and "enabled" in keys and isinstance(given, dict) and given and "enabled" not in given:
            if place[0] in KEPT_FROM_DEEPSPEED or known.default(place, "enabled"):
                continue
            key = ".".join(place)
            yield Finding("warning", key, f"{key} has no effect: {key}.enabled is false unless set; set it to true")


def _idle(run: RunConfig) -> Iterator[Finding]:
    for key, value in _written(run):
        if isinstance(value, dict) or key.endswith(".stage") or (key.endswith(".device") and value == "none"):
            continue
        rules = [rule for rule in WITHOUT_EFFECT if any(fnmatchcase(key, pattern) for pattern in rule.keys)]
        if idle := next((rule for rule in rules if not rule.when(run)), None):
            yield Finding("warning", key, f"{key}={json.dumps(value)} has no effect: {idle.why}")


def _contradicting(run: RunConfig) -> Iterator[Finding]:
    for key, value in _written(run):
        for rule in CONTRADICTIONS:
            if rule.key == key and rule.when(run):
                yield Finding("warning", key, f"{key}={json.dumps(value)} {rule.why}")


def _written(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """DeepSpeed's keys that the file has, and ours that differ from their defaults."""
    yield from _nodes(run.deepspeed_raw)
    yield from _nodes(run.megagpt.model_dump(mode="json", exclude_defaults=True), SECTION)


def _set(model: BaseModel, path: str = "") -> Iterator[tuple[str, Any]]:
    """Our keys that the file has."""
    yield from _nodes(model.model_dump(mode="json", exclude_unset=True), path)


def _nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, sections too."""
    for key, value in node.items():
        dotted = f"{path}.{key}" if path else key
        yield dotted, value
        if isinstance(value, dict):
            yield from _nodes(value, dotted)


def _at(raw: dict[str, Any], place: Place) -> Any:
    node: Any = raw
    for key in place:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _once(found: list[Finding]) -> list[Finding]:
    """The first on each key."""
    return list({finding.key: finding for finding in reversed(found)}.values())[::-1]
