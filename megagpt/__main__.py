"""Run the `megagpt` command: parse the arguments, then import only the command's module, so that --help is fast."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from megagpt.cli import data
from megagpt.cli.arguments import command_line
from megagpt.errors import UserError
from megagpt.open_files import raise_limit
from megagpt.terminal import exit_code_of

# Command -> its module below megagpt.cli, and its function.
COMMANDS = {
    "init": ("init", "run"),
    "train": ("pretrain", "run"),
    "generate": ("generate.command", "run"),
    "evaluate": ("evaluate.command", "run"),
    "average": ("average", "run"),
    "export": ("export", "run"),
    "import": ("import_model", "run"),
    "check-hosts": ("doctor.command", "run_check_hosts"),
    "doctor": ("doctor.command", "run"),
    "checkpoints": ("checkpoints", "run"),
    "report": ("report", "run"),
    "lint": ("lint", "run"),
    "plan": ("plan.command", "run"),
    "slurm": ("slurm", "run"),
    "tune": ("tune", "run"),
    "verify-resume": ("verify_resume", "run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    raise_limit()
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["data"]:  # has a parser of its own
        return exit_code_of(lambda: data.run(argv[1:]))
    parser = command_line()
    if not argv:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        return exit_code_of(lambda: _refuse(args, rest))
    # Overrides that follow an option are not collected by argparse.
    if rest:
        args.overrides += rest
    module, function = COMMANDS[args.command]
    return exit_code_of(lambda: int(getattr(import_module(f"megagpt.cli.{module}"), function)(args)))


def _refuse(args: argparse.Namespace, rest: Sequence[str]) -> int:
    no_option = import_module("megagpt.cli.unknown_options").no_option
    raise UserError(no_option(args, rest, f"megagpt {args.command}"))


if __name__ == "__main__":
    sys.exit(main())
