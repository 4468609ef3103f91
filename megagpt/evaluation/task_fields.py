"""Compare what a task's YAML reads with its documents: lm-evaluation-harness scores a wrong field 0, without a word."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import Any

from megagpt.errors import UserError

READ = ("doc_to_text", "doc_to_target", "doc_to_choice")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
NAME = re.compile(r"[A-Za-z_]\w*([.-]\w+)*")  # of a field: a text has a space or a sign
ONE_BRACE = re.compile(r"(?<!\{)\{ *(\w+) *\}(?!\})")
WHOLE_FIELD = re.compile(r"\{\{ *(\w+) *\}\}")  # prints None where it is null
SHOWN = 60  # characters of a value


def check_fields(task: Any, file: Path) -> None:
    """Raise a UserError if a YAML file names a field that the documents lack, or a target that is no choice."""
    settings = task.config
    given = [(key, getattr(settings, key)) for key in READ]
    given += [(f"fewshot_config: {key}", getattr(task.fewshot_cfg, key, None)) for key in READ]
    for key, value in given:
        if isinstance(value, str):
            _check_name(key, value, task.features, file, settings.doc_to_choice)
    of_choices = settings.doc_to_choice is not None and not callable(settings.process_results)
    for number, doc in enumerate(task.eval_docs, start=1):
        for key, field in _fields_of(settings):
            if doc.get(field) is None:
                raise UserError(f"{file}: {key} reads {field}, which is null in document {number}; give it a value")
        if of_choices:
            _check_target(task, doc, number, file)


def explain_fields(error: BaseException, settings: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError if an error of the package comes from a field that the documents lack, or from a wrong key."""
    for key in READ[:2]:
        if settings.get(key) is None:
            raise UserError(f"{file} has no key {key}; add it") from error
    metrics = import_module("lm_eval.api.registry").METRIC_REGISTRY
    for one in settings.get("metric_list") or ():
        name = one.get("metric") if isinstance(one, dict) else None
        if isinstance(name, str) and name not in metrics and (near := get_close_matches(name, metrics, n=1)):
            raise UserError(f"{file}: {name} is no metric of lm-evaluation-harness; did you mean {near[0]}?") from error
    for key in SPLITS:
        if isinstance(error, KeyError) and settings.get(key) is not None and error.args == (settings[key],):
            raise UserError(f"{file}: {key}: {settings[key]} is no split of its data; correct it") from error
    docs = [frame.f_locals.get("doc") for frame, _ in walk_tb(error.__traceback__)]
    doc = next((one for one in docs if isinstance(one, Mapping)), None)
    if doc is None:
        return
    for key in READ:
        if isinstance(value := settings.get(key), str):
            _check_name(key, value, [*doc], file, settings.get("doc_to_choice"))
    if type(error).__name__ == "UndefinedError":  # of Jinja
        raise UserError(f"{file}: {error}; its documents have the fields {', '.join(doc)}") from error


def _fields_of(settings: Any) -> Iterator[tuple[str, str]]:
    """Return the fields that are read as they are, and the key that reads each."""
    for key in READ[:2]:
        if isinstance(value := getattr(settings, key), str):
            for field in WHOLE_FIELD.findall(value):
                yield key, field


def _check_name(key: str, value: str, fields: Sequence[str], file: Path, choices: Any) -> None:
    """Raise a UserError if a value that looks like a field is none, which the package takes for a fixed text."""
    have = f"no field of its documents, which have {', '.join(fields)}"
    one_brace = ONE_BRACE.search(value)
    if one_brace and one_brace[1] in fields:
        raise UserError(f"{file}: {key}: {value!r:.{SHOWN}} is a fixed text; a field is written {{{{{one_brace[1]}}}}}")
    if not NAME.fullmatch(value) or value in fields or (isinstance(choices, list) and value in choices):
        return
    near = get_close_matches(value, fields, n=1)
    meant = f"did you mean {near[0]}? A" if near else "correct it; a"
    raise UserError(f"{file}: {key}: {value} is {have}; {meant} fixed text is written \"{{{{'{value}'}}}}\"")


def _check_target(task: Any, doc: Mapping[str, Any], number: int, file: Path) -> None:
    """Raise a UserError if a document's target is none of its choices, as -1 is where the labels are kept secret."""
    key = "doc_to_text" if task.multiple_input else "doc_to_target"  # the one that gives the number of the right choice
    target, choices = getattr(task, key)(doc), task.doc_to_choice(doc)
    for one in target if isinstance(target, list) and target else [target]:
        is_number = isinstance(one, int | float) and 0 <= one < len(choices) and one == int(one)
        if not is_number and not (isinstance(one, str) and one in choices):
            raise UserError(
                f"{file}: the target of document {number}, {one!r:.{SHOWN}}, is none of its {len(choices)} choices "
                f"{choices!r:.{2 * SHOWN}}, nor the number of one, counted from 0; correct {key}: "
                f"{getattr(task.config, key)!r:.{SHOWN}}, or the data, which has {', '.join(task.features)}"
            )
