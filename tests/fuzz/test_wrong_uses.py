"""No command answers a wrong environment, folder or value by a traceback, an unknown exit code or leftovers."""

import argparse

import pytest
from wrong_uses import COMMANDS, campaign

from data_tools.arguments import builder_parser
from megagpt.cli.arguments import command_line


def test_every_command_of_both_programs_is_drawn():
    drawn = {tuple(words[2:4]) for words in COMMANDS.values()}
    for program, parser in (("megagpt", command_line()), ("data_tools", builder_parser())):
        known = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
        assert {(program, command) for command in known} <= drawn


@pytest.mark.process
@pytest.mark.parametrize(("seed", "n_cases"), [(1, 12), pytest.param(2, 400, marks=pytest.mark.long)])
def test_every_wrong_use_ends_in_one_message(tmp_path, seed, n_cases):
    assert list(campaign(seed, n_cases, tmp_path)) == []
