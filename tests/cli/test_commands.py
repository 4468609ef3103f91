"""The `megagpt` command itself: its help, its version, and the builder behind `megagpt data`."""

import argparse
import sys

import pytest

import megagpt
from data_tools.__main__ import main as builder
from megagpt.__main__ import COMMANDS, main
from megagpt.cli.arguments import command_line, training_arguments


def test_without_arguments_it_prints_its_help_with_all_commands(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: megagpt ")
    assert [command for command in ("data", *COMMANDS) if f"\n    {command}" not in printed] == []


def test_its_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"megagpt {megagpt.__version__}\n"


def test_data_is_the_builder(capsys, tmp_path):
    outcomes = []
    for command, prefix in ((main, ["data"]), (builder, [])):
        code = command([*prefix, "verify", str(tmp_path / "nowhere")])
        outcomes.append((code, capsys.readouterr()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 2
    with pytest.raises(SystemExit, match="0"):
        main(["data", "build", "--help"])
    assert "val_fraction" in capsys.readouterr().out


def test_data_without_the_builders_packages_names_the_command_that_installs_them(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "data_tools.__main__")
    monkeypatch.setitem(sys.modules, "data_tools.build", None)
    assert main(["data", "verify", "x"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: megagpt data needs the package data_tools.build, ")
    assert "pip install 'megagpt[data]'" in printed


def options(parser, command=""):
    """Every option that takes a value: (command, its action)."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, name)
        elif action.option_strings and action.nargs != 0 and action.help != argparse.SUPPRESS:
            yield command, action


def test_the_help_tells_the_default_of_every_option():
    found = {
        (command, action.option_strings[0]): action
        for command, action in [*options(command_line()), *options(training_arguments(), "pretrain")]
    }
    assert len(found) > 30
    told = {key: (action.help or "") % vars(action) for key, action in found.items()}
    assert [key for key, text in told.items() if "default: " not in text] == []
    for key, action in found.items():
        if isinstance(action.default, int | float):
            assert told[key].endswith((f"default: {action.default}", f"default: {action.default:g}"))
