"""The `python -m data_tools` command: parse the arguments and call the subcommand."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from data_tools.arguments import builder_parser, known_arguments, overrides_in
from data_tools.build import build
from data_tools.compare_tokenizers import KINDS, compare_tokenizers, table_of
from data_tools.config import BuildConfig, TokenizerConfig, load_config
from data_tools.inspect import inspect, inspect_samples
from data_tools.report.summary import summary
from data_tools.stages.train_tokenizer import train_tokenizer
from data_tools.verify import verify
from megagpt.open_files import raise_limit
from megagpt.terminal import builder_command, exit_code_of, show

INCOMPLETE = 3  # exit code of a build that could not read some of its files
Output = tuple[str, int]
"""What a command prints, and its exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for the user's mistakes, 3 without some files, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        builder_parser().print_help()
        return 0
    args, rest = known_arguments(argv)
    args.typed_command = f"{builder_command()} {shlex.join(argv)}"
    raise_limit()
    interrupted = INTERRUPTED.get(args.command, "interrupted").format(**vars(args))
    return exit_code_of(lambda: _run(args, overrides_in(args, rest)), interrupted=interrupted)


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    output, code = COMMANDS[args.command](args, overrides)
    show(output)
    return code


def _build(args: argparse.Namespace, overrides: Sequence[str]) -> Output:
    config = load_config(BuildConfig, args.config, _with_strict(args, overrides))
    report = build(
        args.input, args.out, config, args.scheduler, val=args.val, test=args.test, command=args.typed_command
    )
    return summary(report, args.out), INCOMPLETE if report["unreadable"] else 0


def _with_strict(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    return [*overrides, *(["strict=true"] if args.strict else [])]


def _train_tokenizer(args: argparse.Namespace, overrides: Sequence[str]) -> Output:
    config = load_config(TokenizerConfig, args.config, _with_strict(args, overrides))
    tokenizer = train_tokenizer(args.input, args.out, config, args.scheduler)
    size = f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces"
    return f"{args.out} is ready: {size}; use it with tokenizer={args.out}", 0


def _compare_tokenizers(args: argparse.Namespace, overrides: Sequence[str]) -> Output:
    config = load_config(BuildConfig, args.config, _with_strict(args, overrides))
    kinds = args.types.split(",") if args.types is not None else () if args.tokenizer else KINDS
    rows = compare_tokenizers(
        args.input, config, models=args.tokenizer, kinds=kinds, steps=args.steps, val=args.val, test=args.test
    )
    return json.dumps(rows, indent=1) if args.json else table_of(rows, args.steps), 0


def _verify(args: argparse.Namespace, _: Sequence[str]) -> Output:
    return verify(args.folder), 0


def _inspect(args: argparse.Namespace, _: Sequence[str]) -> Output:
    if args.sample is not None or args.step is not None:
        return inspect_samples(args.folder, sample=args.sample, step=args.step), 0
    return inspect(args.folder, split=args.split, documents=args.documents, as_json=args.json), 0


COMMANDS = {
    "build": _build,
    "train-tokenizer": _train_tokenizer,
    "compare-tokenizers": _compare_tokenizers,
    "verify": _verify,
    "inspect": _inspect,
}
INTERRUPTED = {
    "build": "interrupted; finished tasks are kept in {out}/.build: run the same command again to resume",
}


if __name__ == "__main__":
    sys.exit(main())
