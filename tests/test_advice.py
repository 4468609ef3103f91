"""Advice in messages works as it is typed: keys that it sets, options that it names, commands in backticks."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from lint.test_linter import MISTAKES, SOUND
from test_messages import FILES, ROOT, texts

from data_tools.arguments import builder_parser
from data_tools.config import BuildConfig
from megagpt.cli.arguments import command_line, training_arguments
from megagpt.config.run_file import KEYS
from megagpt.config.schema_keys import typed_keys
from megagpt.engine.deepspeed_models import SECTION_MODELS
from megagpt.lint.linter import lint_file

OF_DEEPSPEED = {f"{section}.{key}" for section, model in SECTION_MODELS.items() for key in model.model_fields}
# Options that messages name of torchrun, deepspeed, Slurm, apptainer, TensorBoard and hf.
OTHERS = {
    "--nproc-per-node",
    "--num_gpus",
    "--ntasks-per-node",
    "--master_port",
    "--master-port",
    "--nv",
    "--logdir",
    "--signal",
    "--local-dir",
}
BUILD_KEYS = typed_keys(BuildConfig)


@pytest.fixture(scope="module")
def messages() -> list[tuple[Path, int, str]]:
    return [(path, line, text) for path in FILES for line, text in texts(path)]


def options(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options(below)
    return found


def test_a_key_that_a_message_sets_is_written_in_full(messages):
    """No "it" and no last name alone: what stands there is copied. Environment variables are in capitals."""
    wrong = []
    for path, line, text in messages:
        for name in re.findall(r"\bset (?:the )?([\w.]+) to\b(?! at (?:most|least))", text.replace("{} {}", "at most")):
            if not (name in KEYS | BUILD_KEYS | OF_DEEPSPEED or name.isupper()):
                wrong.append((str(path.relative_to(ROOT)), line, name))
    assert wrong == []


def test_an_option_that_a_message_names_is_one_that_there_is(messages):
    known = options(command_line()) | options(training_arguments()) | options(builder_parser()) | OTHERS
    wrong = []
    for path, line, text in messages:
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            if name not in known and name != "--vocab_size":  # a mistake that a message quotes
                wrong.append((str(path.relative_to(ROOT)), line, name))
    assert wrong == []


def test_a_command_in_a_message_is_one_that_its_parser_takes(messages, capsys):
    parsers = {"megagpt": command_line(), "python -m data_tools": builder_parser(), "{}": builder_parser()}
    tried, wrong = 0, []
    for path, line, text in messages:
        for command in re.findall(r"`((?:megagpt|python -m data_tools|\{\}) [a-z][\w-]* [^`]*)`", text):
            program = next(program for program in parsers if command.startswith(f"{program} "))
            words = shlex.split(command.removeprefix(program).replace("...", "").replace("{}", "1"))
            tried += 1
            try:
                parsers[program].parse_known_args(words)
            except SystemExit as ended:
                if ended.code:
                    wrong.append((str(path.relative_to(ROOT)), line, command, capsys.readouterr().err[-200:]))
    assert tried >= 10
    assert wrong == []


SET = re.compile(r"(?:\bset|or) (?!it\b)([\w.]+) to (\{.*?\}|\"[^\"]*\"|'[^']*'|[\w.]+)")


@pytest.mark.parametrize("overrides", [mistake[0] for mistake in MISTAKES], ids=[m[0][-1][:48] for m in MISTAKES])
def test_advice_of_lint_that_is_typed_ends_its_complaint(tmp_path, overrides):
    """Each value that a message sets, and each key that it takes for the one that was meant."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SOUND))
    [issue] = lint_file(path, overrides)
    without = [f"{key}=false" for key in re.findall(r" without ([\w.]+)", issue.text) if key in KEYS]
    for key, value in SET.findall(issue.text):
        changed = value.strip("'\",") if value[0] in "'\"" else value.rstrip(".,")
        assert issue.text not in [
            again.text for again in lint_file(path, [*overrides, *without, f"{key}={changed}"])
        ], key
    if meant := re.search(r"did you mean '([\w.]+)'", issue.text):
        *others, slip = overrides
        again = lint_file(path, [*others, f"{meant[1]}={slip.partition('=')[2]}"])
        assert not any("unknown key" in other.text for other in again)
