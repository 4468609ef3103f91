"""The examples of the documentation: each block parses, and each command is one that the programs accept.

Run by tests as well: the tutorial (test_tutorial.py), and the Python blocks of README.md and docs/use.md
(test_language_model.py). All others are only parsed here, up to the run file with every key that a command changes.
"""

import argparse
import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import json5
import pytest
from test_docs import PAGES, ROOT, page_id

from data_tools.arguments import builder_parser, known_arguments, overrides_in
from data_tools.config import load_config
from megagpt.__main__ import COMMANDS
from megagpt.cli.arguments import command_line, training_arguments
from megagpt.config.run_file import load_run_config

BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "python", "json", "json5", "text"}
ANY_RUN_FILE = ROOT / "ds_configs" / "gpt2_124m.json"  # in place of RUN.json and of files that a reader writes
NAMED = re.compile(r"`(megagpt data|megagpt|python -m data_tools) ([a-z][\w-]*)(?![\w./-])([^`]*)`")
KEY_VALUE = re.compile(r"[\w.]+=")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    return BLOCK.findall(page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the shell blocks of a page, without comments and redirections."""
    for language, text in blocks(page):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if ">" in words:
                    words = words[: words.index(">")]
                if words:
                    yield words


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_has_a_language_and_parses(page):
    text = page.read_text()
    assert text.count("\n```") == 2 * len(blocks(page))
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    for language, block in blocks(page):
        if language == "python":
            ast.parse(block)
        if language.startswith("json"):  # an object, or some of its keys
            assert json5.loads(block if block.lstrip().startswith("{") else f"{{{block}}}")


@pytest.mark.process
def test_every_shell_block_parses():
    scripts = [text for page in PAGES for language, text in blocks(page) if language == "sh"]
    assert len(scripts) > 25
    ran = subprocess.run(["bash", "-n"], input="\n".join(scripts), capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_accepted_with_its_options_and_keys(page, capsys):
    for words in commands(page):
        try:
            _parse(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_command_that_is_named_exists_and_has_the_options_named_with_it(page):
    prose = " ".join(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).split())
    known = {"megagpt": options_of(command_line()), "python -m data_tools": options_of(builder_parser())}
    known["megagpt data"] = known["python -m data_tools"]
    for program, name, rest in NAMED.findall(prose):
        assert name in known[program], f"{program} {name}"
        options = set(re.findall(r"--[a-z][\w-]*", re.sub(r'"[^"]*"', "", rest)))
        assert options <= known[program][name], f"{program} {name}{rest}"


def options_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """The options of each command."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(command._option_string_actions) for name, command in commands.choices.items()}


def _parse(words: list[str]) -> None:
    """Parse a command of ours as it would be, up to its run file with all overrides; leave others alone."""
    if words[:3] == ["python", "-m", "data_tools"] or words[:2] == ["megagpt", "data"]:
        args, rest = known_arguments(words[2 + (words[0] == "python") :])
        if overrides := overrides_in(args, rest):
            load_config(args.model, None, [*overrides, *(["input=x"] if "input" in args.model.model_fields else [])])
    elif words[0] == "megagpt":
        args, rest = command_line().parse_known_args(words[1:])
        assert args.command in {*COMMANDS, "data"}
        assert not rest or all(KEY_VALUE.match(word) for word in rest), rest
        if "run_file" in args and args.run_file:
            _read(args.run_file, [*args.overrides, *rest])
    elif "launch/pretrain.py" in words:
        args = training_arguments().parse_args(words[words.index("launch/pretrain.py") + 1 :])
        _read(args.run_file, args.overrides)


def _read(run_file: Path, overrides: list[str]) -> None:
    exists = (ROOT / run_file).is_file()
    load_run_config(ROOT / run_file if exists else ANY_RUN_FILE, overrides)
