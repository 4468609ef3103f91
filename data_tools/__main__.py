"""The `python -m data_tools` command: parse the arguments and call the subcommand."""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

from pydantic import BaseModel

from data_tools.build import build
from data_tools.compare_tokenizers import KINDS, UNUSED_OPTIONS, compare_tokenizers, table_of
from data_tools.config import BuildConfig, TokenizerConfig, load_config
from data_tools.inspect import inspect, inspect_samples
from data_tools.report.summary import summary
from data_tools.stages.train_tokenizer import train_tokenizer
from data_tools.verify import verify
from megagpt.data.manifest import SPLITS
from megagpt.open_files import raise_limit
from megagpt.options import Parser, whole
from megagpt.terminal import exit_code_of, show
from megagpt.user_paths import user_path, user_url_or_path

INCOMPLETE = 3  # exit code of a build that could not read some of its files
Output = tuple[str, int]
"""What a command prints, and its exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for the user's mistakes, 3 without some files, 130 after Ctrl-C."""
    parser = _parser()
    # parse_known_args, because argparse does not accept options and key=value pairs in any order
    args, rest = parser.parse_known_args(argv)
    if wrong := [item for item in rest if item.startswith("-") or "config" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    raise_limit()
    return exit_code_of(lambda: _run(args, rest), interrupted=INTERRUPTED.get(args.command, "interrupted"))


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    output, code = COMMANDS[args.command](args, overrides)
    show(output)
    return code


def _build(args: argparse.Namespace, overrides: Sequence[str]) -> Output:
    config = load_config(BuildConfig, args.config, _with_strict(args, overrides))
    report = build(args.input, args.out, config, args.scheduler, val=args.val, test=args.test)
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
INTERRUPTED = {"build": "interrupted; finished tasks are kept: run the same command again to resume"}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m data_tools", description="Build token shards from text.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example:\n  python -m data_tools {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_builders(command)
    _add_readers(command)
    return parser


def _add_builders(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    build_command = command(
        "build",
        "Build a dataset folder from text, JSON, CSV, Parquet, Arrow and web pages; see docs/data.md.",
        "--input books/ wiki.jsonl.zst --out data/corpus vocab_size=32000 val_fraction=0.005\n\n"
        + _options(BuildConfig),
    )
    build_command.add_argument("--out", type=user_path, required=True, help="the dataset folder to write")
    train_command = command(
        "train-tokenizer",
        "Train a SentencePiece model on a sample of the input.",
        "--input books/ --out tokenizer.model vocab_size=32000\n\n" + _options(TokenizerConfig),
    )
    train_command.add_argument("--out", type=user_path, required=True, help="the model file to write")
    for with_out in (build_command, train_command):
        splits = " [--val PATH ...] [--test PATH ...]" if with_out is build_command else ""
        with_out.usage = f"%(prog)s --input PATH [PATH ...]{splits} --out PATH [--config FILE] [key=value ...]"
        with_out.add_argument(
            "--scheduler",
            metavar="ADDRESS",
            help="a running Dask scheduler (tcp://host:8786), or slurm",
        )
    compare_command = _add_compare(command)
    for with_splits in (build_command, compare_command):
        for split, what in (("val", "validation"), ("test", "test")):
            with_splits.add_argument(
                f"--{split}",
                nargs="+",
                action="extend",
                type=user_url_or_path,
                default=[],
                metavar="PATH",
                help=f"the {what} split: never trained on",
            )
    for with_input in (build_command, train_command, compare_command):
        with_input.add_argument(
            "--input",
            nargs="+",
            action="extend",
            type=user_url_or_path,
            default=[],
            metavar="PATH",
            help="files, folders, globs, URLs",
        )
        with_input.add_argument("--strict", action="store_true", help="the same as strict=true")
        with_input.add_argument("--config", type=user_path, metavar="FILE", help="options as a JSON object")


def _add_compare(command: Callable[[str, str, str], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add compare-tokenizers without the options that it shares with `build`; returns its parser."""
    parser = command(
        "compare-tokenizers",
        "Compare tokenizers on the same text: its length in tokens, speed, and a small model's bits per byte.",
        "--input books/ code/ --types unigram,bpe vocab_size=8000\n"
        "  python -m data_tools compare-tokenizers --input books/ --tokenizer mine.model theirs.model --steps 0\n\n"
        + _options(BuildConfig, without=UNUSED_OPTIONS),
    )
    parser.usage = (
        "%(prog)s --input PATH [PATH ...] [--val PATH ...] [--test PATH ...] [--tokenizer MODEL ...] "
        "[--types TYPE,...] [--steps N] [--config FILE] [--json] [key=value ...]"
    )
    parser.add_argument(
        "--tokenizer",
        nargs="+",
        action="extend",
        default=[],
        type=user_path,
        metavar="MODEL",
        help="trained models to compare",
    )
    parser.add_argument(
        "--types",
        metavar="TYPE,...",
        help=f"train these, of {','.join(KINDS)}; by default all, or none with --tokenizer",
    )
    parser.add_argument(
        "--steps",
        type=whole(0, 1_000_000),
        default=200,
        metavar="N",
        help="training steps of the small model (200); 0: no training",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_readers(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    verify_command = command("verify", "Check every byte of a dataset and report what is damaged.", "data/corpus")
    inspect_command = command(
        "inspect",
        "Show what a dataset contains, or the samples of a run.",
        "data/corpus --split val --documents 3\n  python -m data_tools inspect runs/gpt2_124m --step 1200",
    )
    inspect_command.add_argument("--split", choices=SPLITS, default="train")
    inspect_command.add_argument("--documents", type=whole(0), default=0, metavar="N", help="show the first N as text")
    shown = inspect_command.add_mutually_exclusive_group()
    shown.add_argument(
        "--sample", type=whole(0, 10**15), metavar="N", help="in a run's folder: the text of global sample N"
    )
    shown.add_argument(
        "--step", type=whole(1, 10**15), metavar="S", help="in a run's folder: the text of every sample of step S"
    )
    inspect_command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    for with_folder in (verify_command, inspect_command):
        with_folder.add_argument("folder", type=user_path)


def _options(model: type[BaseModel], without: Collection[str] = ()) -> str:
    """Return the key=value options with defaults and descriptions, one per line, for --help."""
    return "\n".join(["options (key=value, or the same keys in --config):", *_option_lines(model, "", without)])


def _option_lines(model: type[BaseModel], prefix: str, without: Collection[str] = ()) -> Iterator[str]:
    for name, info in model.model_fields.items():
        if name in without:
            continue
        default = info.default
        if isinstance(default, BaseModel):
            yield from _option_lines(type(default), f"{prefix}{name}.")
            continue
        shown = "" if default in (None, ()) else str(default)
        yield f"  {prefix + name + '=' + shown:31} {info.description or ''}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
