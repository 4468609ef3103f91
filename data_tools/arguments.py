"""The command-line arguments of `python -m data_tools`, their help, and what somebody meant who typed others."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_tools.compare_tokenizers import KINDS, UNUSED_OPTIONS
from data_tools.config import BuildConfig, InputConfig, TokenizerConfig, load_config
from megagpt import __version__
from megagpt.config.schema_keys import models_in, typed_keys
from megagpt.data.manifest import SPLITS
from megagpt.errors import UserError
from megagpt.options import Parser, whole
from megagpt.terminal import builder_command
from megagpt.user_paths import user_path, user_url_or_path

# What people type who know other tools -> what it is here.
OTHER_NAMES = {
    **dict.fromkeys(("i", "in", "inputs", "data", "files", "input_dir", "input_files", "train"), "--input"),
    **dict.fromkeys(
        ("o", "output", "model_prefix", "outdir", "out_dir", "output_dir", "output_prefix", "output_path"), "--out"
    ),
    **dict.fromkeys(("c", "cfg", "options"), "--config"),
    **dict.fromkeys(("j", "jobs", "num_workers", "n_workers", "processes", "num_proc"), "workers"),
    **dict.fromkeys(("vocab", "vocabulary"), "vocab_size"),
    **dict.fromkeys(("tokenizer_model", "model", "vocab_file"), "tokenizer"),
    **dict.fromkeys(("model_type", "type"), "tokenizer_type"),
    **dict.fromkeys(("json_key", "json_keys", "field", "column", "text_column"), "text_field"),
}
COLUMN = 34  # where the descriptions of key=value options begin
AddCommand = Callable[[str, str, str, str], Parser]
"""add_command(name, what it does, usage, example) returns the command's parser."""


def known_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return what argparse knows, and the rest: key=value pairs and mistakes. Ends the process after --help."""
    # parse_known_args, because argparse does not accept options and key=value pairs in any order
    return builder_parser().parse_known_args(argv)


def builder_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog=builder_command(), description="Build datasets of tokens from text, check and show them.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, what: str, usage: str, example: str) -> Parser:
        command: Parser = commands.add_parser(
            name,
            help=what,
            description=what,
            usage="%(prog)s " + usage.replace("\n", "\n       "),
            epilog=f"example:\n  {builder_command()} {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(parser=command)
        return command

    _add_build(add_command)
    _add_train_tokenizer(add_command)
    _add_compare(add_command)
    _add_readers(add_command)
    return parser


def _add_build(add_command: AddCommand) -> None:
    command = add_command(
        "build",
        "Build a dataset folder from text, JSON, CSV, Parquet, Arrow and web pages; see\ndocs/data.md.",
        "--input PATH [PATH ...] --out DIR\n[--val PATH ...] [--test PATH ...] [--config FILE] [--strict]\n"
        "[--scheduler ADDRESS] [key=value ...]",
        "--input books/ wiki.jsonl.zst --out data/corpus \\\n      vocab_size=32000 val_fraction=0.005\n\n"
        + _options(BuildConfig),
    )
    _add_input(command, BuildConfig, with_splits=True)
    command.add_argument("--out", type=user_path, metavar="DIR", help="the dataset folder to write (required)")
    _add_scheduler(command)


def _add_train_tokenizer(add_command: AddCommand) -> None:
    command = add_command(
        "train-tokenizer",
        "Train a SentencePiece model on a sample of the input.",
        "--input PATH [PATH ...] --out FILE\n[--config FILE] [--strict] [--scheduler ADDRESS] [key=value ...]",
        "--input books/ --out tokenizer.model \\\n      vocab_size=32000\n\n" + _options(TokenizerConfig),
    )
    _add_input(command, TokenizerConfig, with_splits=False)
    command.add_argument("--out", type=user_path, metavar="FILE", help="the model file to write (required)")
    _add_scheduler(command)


def _add_input(command: Parser, model: type[InputConfig], *, with_splits: bool) -> None:
    """Add the options of all commands that read text; their key=value pairs are those of `model`."""
    command.set_defaults(model=model)
    paths = {"input": "files, folders, globs, URLs"}
    if with_splits:
        paths |= {"val": "the validation split: never trained on", "test": "the test split: never trained on"}
    for name, what in paths.items():
        command.add_argument(
            f"--{name}", nargs="+", action="extend", type=user_url_or_path, default=[], metavar="PATH", help=what
        )
    command.add_argument("--config", type=user_path, metavar="FILE", help="options as a JSON object (default: none)")
    command.add_argument("--strict", action="store_true", help="the same as strict=true")


def _add_scheduler(command: Parser) -> None:
    command.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running Dask scheduler (tcp://host:8786), or slurm (default: workers on this machine)",
    )


def _add_compare(add_command: AddCommand) -> None:
    command = add_command(
        "compare-tokenizers",
        "Compare tokenizers on the same text: its length in tokens, speed, and a small\nmodel's bits per byte.",
        "--input PATH [PATH ...]\n[--val PATH ...] [--test PATH ...] [--tokenizer MODEL ...]\n"
        "[--types TYPE,...] [--steps N] [--config FILE] [--strict] [--json]\n[key=value ...]",
        "--input books/ code/ \\\n      --types unigram,bpe vocab_size=8000\n"
        f"  {builder_command()} compare-tokenizers --input books/ \\\n      --tokenizer mine.model theirs.model "
        "--steps 0\n\n" + _options(BuildConfig, without=UNUSED_OPTIONS),
    )
    _add_input(command, BuildConfig, with_splits=True)
    command.add_argument(
        "--tokenizer",
        nargs="+",
        action="extend",
        default=[],
        type=user_path,
        metavar="MODEL",
        help="trained models to compare",
    )
    command.add_argument(
        "--types",
        metavar="TYPE,...",
        help=f"train these, of {','.join(KINDS)} (default: all, or none with --tokenizer)",
    )
    command.add_argument(
        "--steps",
        type=whole(0, 1_000_000),
        default=200,
        metavar="N",
        help="training steps of the small model; 0: no training (default: 200)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_readers(add_command: AddCommand) -> None:
    verify_command = add_command(
        "verify", "Check every byte of a dataset and report what is damaged.", "DIR", "data/corpus"
    )
    inspect_command = add_command(
        "inspect",
        "Show what a dataset contains, or the samples of a run.",
        "DIR [--split SPLIT] [--documents N] [--json]\n[--sample N | --step S]",
        f"data/corpus --split val --documents 3\n  {builder_command()} inspect runs/gpt2_124m --step 1200",
    )
    inspect_command.add_argument(
        "--split", choices=SPLITS, default="train", help="train, val or test (default: train)", metavar="SPLIT"
    )
    inspect_command.add_argument(
        "--documents", type=whole(0), default=0, metavar="N", help="show the first N as text (default: 0)"
    )
    shown = inspect_command.add_mutually_exclusive_group()
    shown.add_argument(
        "--sample", type=whole(0, 10**15), metavar="N", help="in a run's folder: the text of global sample N"
    )
    shown.add_argument(
        "--step", type=whole(1, 10**15), metavar="S", help="in a run's folder: the text of every sample of step S"
    )
    inspect_command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    for with_folder in (verify_command, inspect_command):
        with_folder.add_argument("folder", type=user_path, metavar="DIR", help="a dataset's folder, or a run's")


def _options(model: type[BaseModel], without: Collection[str] = ()) -> str:
    """Return the key=value options with defaults and descriptions, for --help."""
    width = min(shutil.get_terminal_size().columns or 80, 120) - 2
    lines = ["options (key=value, or the same keys in --config), with their defaults:"]
    section = None
    for key, default, description in option_defaults(model, without=without):
        # a blank line before each section
        if (own := key.rpartition(".")[0]) != section and (own or section):
            lines.append("")
        section = own
        head = f"  {key}={default}"
        body = textwrap.wrap(description, max(width - COLUMN, 20))
        if len(head) < COLUMN - 1 and body:
            head = head.ljust(COLUMN) + body.pop(0)
        lines += [head, *(" " * COLUMN + line for line in body)]
    return "\n".join(lines)


def option_defaults(
    model: type[BaseModel], prefix: str = "", without: Collection[str] = ()
) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, description) of each option, as they are typed; a rule that is off also has its own."""
    inner = []
    for name, info in model.model_fields.items():
        if name in without:
            continue
        sections = [] if name == "sources" else list(models_in(info.annotation))
        if sections:
            inner.append((sections[0], f"{prefix}{name}."))
        if not isinstance(info.default, BaseModel):
            default = "PATH" if info.is_required() else _as_typed(False if sections else info.default)
            yield f"{prefix}{name}", default, info.description or ""
    for section, key in inner:
        yield from option_defaults(section, key)


def _as_typed(value: Any) -> str:
    """Return a default as it would be typed."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    whole_number = int(value) if isinstance(value, float) and value == int(value) else value
    return json.dumps(whole_number, separators=(",", ":"), default=str)


def overrides_in(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the key=value pairs among what argparse did not know. Raises UserError for anything else there."""
    if "model" not in args:
        if rest:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return []
    options, keys = args.parser._option_string_actions.keys(), typed_keys(args.model)
    items = [item for item in rest if item != "--"]
    overrides = []
    while items:
        item = items.pop(0)
        has_blank = item.endswith("=") and items[:1] and not items[0].startswith("-") and "=" not in items[0]
        key = item.partition("=")[0]
        is_option = key not in keys and f"--{key}" in options
        if item.startswith(("-", "=")) or "=" not in item or has_blank or is_option:
            raise UserError(_what_was_meant(item, items, args.model, options))
        overrides.append(item)
    if "out" in args and args.out is None:
        raise UserError(f"--out is missing; give what to write, as in {args.parser.prog} --input PATH --out PATH")
    return overrides


def _what_was_meant(item: str, following: Sequence[str], model: type[InputConfig], options: Collection[str]) -> str:
    """Return a message about an argument that is neither an option nor key=value, with the one that was meant."""
    keys = typed_keys(model)
    is_name = item.startswith("-") or "=" in item or item in keys
    if not is_name and (Path(item).exists() or {"/", "*", "."} & set(item)):
        return f"{item} is no option; paths to read go after --input: --input {item}"
    typed, _, value = item.lstrip("-").partition("=")
    name = typed.replace("-", "_")
    if name not in keys:
        name = f"--{name}" if f"--{name}" in options else OTHER_NAMES.get(name, name)
    if not value and following:
        value = next((word for word in following if word != "=" and not word.startswith("-")), "")
    if name in options:
        return f"there is no {item}; write {name} {value or 'PATH'}"
    if name in keys:
        pair = f"{name}={value or 'true'}"
        try:
            load_config(model, None, [pair])
        except UserError as error:
            return f"options are key=value, such as vocab_size=8000 and not --vocab_size 8000: {error}"
        return f"options are key=value: write {pair} and not {item}"
    if item.startswith("-"):
        others = {option.lstrip("-"): f"{option} {value}".strip() for option in options if option.startswith("--")}
        others |= {key: f"{key}={value or '...'}" for key in keys}
        near = get_close_matches(name, others, n=1, cutoff=0.75)
        meant = f"; did you mean {others[near[0]]}?" if near else "; options are key=value, see --help"
        return f"there is no option {item}{meant}"
    return f"{item!r} is not of the form key=value; see --help"
