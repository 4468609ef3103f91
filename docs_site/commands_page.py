"""Write the page of all commands from their argparse parsers, as --help would print it."""

import argparse
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from data_tools.arguments import builder_parser
from docs_site.markdown import block, page, plain, term
from megagpt.cli.arguments import command_line, training_arguments

WIDTH = 88  # columns, which is what a block of code shows without scrolling on a laptop


def commands_page() -> str:
    """Return the page of `megagpt`, `python -m data_tools` and `launch/pretrain.py`."""
    parts = [
        "Every command with its arguments, as `--help` prints them. Exit codes are in "
        "[Architecture](../docs/architecture.md#exit-codes)."
    ]
    with _columns(WIDTH):
        for parser in (command_line(), builder_parser(), training_arguments()):
            parts += _program(parser)
    return page("Commands", parts)


@contextmanager
def _columns(width: int) -> Iterator[None]:
    """Make argparse wrap lines at a width, whatever the terminal has."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _program(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {parser.prog}"
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield from _command(parser, parser.description or "") if not subparsers else [plain(parser.description or "")]
    for group in subparsers:
        helps = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, command in group.choices.items():
            yield f"### {parser.prog} {name}"
            yield from _command(command, helps.get(name, ""))


def _command(parser: argparse.ArgumentParser, what: str) -> Iterator[str]:
    """Yield what a command does, its usage, arguments and example."""
    yield plain(what[:1].upper() + what[1:]).rstrip(".") + "."
    arguments = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    if not arguments:  # it hands everything to another program
        return
    yield block(textwrap.dedent(" " * len("usage: ") + parser.format_usage().removeprefix("usage: ")))
    for action in arguments:
        values = {"default": action.default, "prog": parser.prog}
        yield term(_spelled(action), "", plain(action.help % values if action.help else "required"))
    example, has_options, _ = (parser.epilog or "").partition("options (key=value")
    if example:
        lines = re.sub(r"^examples?: ?\n?", "", example).replace(", then: ", "\n").splitlines()
        yield block(textwrap.dedent("\n".join(lines)), "sh")
    if has_options:
        yield "Further arguments are `key=value`: [options of a build](build_options.md)."


def _spelled(action: argparse.Action) -> str:
    """Return an argument as it is typed: `--nproc N`, `RUN.json`."""
    metavar = action.metavar or (",".join(map(str, action.choices)) if action.choices else action.dest.upper())
    name = " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
    if not action.option_strings:
        return name
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {name}")
