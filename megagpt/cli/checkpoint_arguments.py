"""The command-line arguments of the `megagpt` commands that use what a run has saved."""

import argparse
from typing import Any

from megagpt.options import LARGEST, decimal, whole
from megagpt.user_paths import user_path

DEFAULT_SPLIT = "val"


def after_a_run(commands: Any) -> None:
    """Add the commands that use a run's checkpoints and curves."""
    _add_generate(commands)
    _add_export(commands)
    _add_import(commands)
    _add_evaluate(commands)
    _add_average(commands)
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list the checkpoints of a run and whether they are complete; exit code 2 if none is",
        epilog="example: megagpt checkpoints runs/demo --verify",
    )
    checkpoints.add_argument("run_dir", type=user_path, metavar="RUN", help="a run's folder, its megagpt.out_dir")
    checkpoints.add_argument("--verify", action="store_true", help="hash every file instead of comparing sizes")

    report = commands.add_parser(
        "report",
        help="write an HTML page about one or several runs: curves, samples, data, how their run files differ",
        epilog="example: megagpt report runs/a runs/b --out a_and_b.html",
    )
    report.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="a run's folder, its megagpt.out_dir")
    report.add_argument(
        "--out",
        type=user_path,
        metavar="FILE.html",
        help="the page to write; default: RUN/report.html, or of several runs report.html here",
    )


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate text from a checkpoint",
        epilog='example: megagpt generate runs/demo --prompt "def main(" --max-tokens 100 --batch 3',
    )
    _add_checkpoint(generate)
    generate.add_argument(
        "--prompt",
        action="append",
        help=r"\n, \t are read as in JSON, \\ as a backslash; may be given several times; default: a new document",
    )
    generate.add_argument(
        "--prompts",
        metavar="FILE",
        help='read prompts from a file: each line as it is, or of a .jsonl its "prompt"; -: standard input; default: '
        "none",
    )
    generate.add_argument(
        "--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D ends"
    )
    for option, kind, default, text in (
        ("--max-tokens", whole(1), 128, "tokens to generate at most"),
        ("--temperature", float, 0.8, "0: always the likeliest token"),
        ("--top-k", whole(0), 50, "draw from that many of the likeliest tokens; 0: the whole vocabulary"),
        ("--top-p", float, 1.0, "draw from the likeliest tokens of this total probability"),
        ("--min-p", float, 0.0, "draw from tokens at least this likely, relative to the likeliest"),
        ("--repetition-penalty", float, 1.0, "above 1: tokens that the text has already become less likely"),
        ("--batch", whole(1, 1_000_000), 1, "texts for each prompt"),
        ("--seed", whole(-LARGEST, LARGEST), 0, "the same seed gives the same texts"),
    ):
        generate.add_argument(option, type=kind, default=default, metavar="N", help=f"{text}; default: %(default)s")
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before this, which is read as --prompt is; may be given several times; default: none",
    )
    generate.add_argument(
        "--json", action="store_true", help="a JSON object per line: text, tokens, log probabilities, why it ended"
    )


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder, and check it with transformers",
        epilog="example: megagpt export runs/demo my-gpt2 --license apache-2.0",
    )
    _add_checkpoint(export)
    export.add_argument("folder", type=user_path, metavar="DIR", help="a new folder")
    export.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights; default: fp32")
    export.add_argument("--license", metavar="NAME", help="for the model card, such as apache-2.0; default: none")


def _add_import(commands: Any) -> None:
    imports = commands.add_parser(
        "import",
        help="make a folder for megagpt.init_from out of a Hugging Face folder of a GPT-2, Llama or Qwen3",
        epilog="example: megagpt import my-gpt2 runs/my-gpt2",
    )
    imports.add_argument("source", type=user_path, metavar="DIR", help="a folder with config.json and weights")
    imports.add_argument("folder", type=user_path, metavar="OUT", help="a new folder")
    imports.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin; only its tensors are loaded"
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="compute the loss, perplexity and bits per byte of a checkpoint, or run tasks of lm-evaluation-harness",
        epilog="example: megagpt evaluate runs/demo --data data/demo --split test",
    )
    _add_checkpoint(evaluate)
    evaluate.add_argument(
        "--data",
        type=user_path,
        action="append",
        metavar="DIR_OR_NAME",
        help="a dataset made by data_tools, or a validation set of the run by its name; may be given several times; "
        "default: all of the run's",
    )
    _add_part_of_data(evaluate, split=None)  # so that it is known whether it was given
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME_OR_DIR",
        help="run these tasks of lm-evaluation-harness (names, YAML files, folders of them); after CKPT; default: none",
    )
    evaluate.add_argument(
        "--limit", type=whole(1), metavar="N", help="documents of each task, its first ones; default: all"
    )
    evaluate.add_argument(
        "--memorization",
        nargs="?",
        type=whole(1, 1_000_000),
        const=256,
        metavar="N",
        help="tell how much the model recites of N passages of its training data; after CKPT; N: 256; default: off",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_average(commands: Any) -> None:
    average = commands.add_parser(
        "average",
        help="average the weights of several steps, and compute the loss of each and of the average",
        epilog="example: megagpt average runs/demo/checkpoints/step_00000300 runs/demo/checkpoints/latest averaged "
        "--weights 1 3",
    )
    average.add_argument(
        "steps",
        type=user_path,
        nargs="+",
        metavar="STEP",
        help="a step's folder, or a run (its best step); two or more",
    )
    average.add_argument("folder", type=user_path, metavar="OUT", help="a new folder")
    average.add_argument(
        "--weights",
        type=_weight,
        nargs="+",
        metavar="W",
        help="one for each STEP, relative to their sum, after OUT; default: equal ones",
    )
    average.add_argument(
        "--data",
        type=user_path,
        metavar="DIR_OR_NAME",
        help="a dataset made by data_tools, or a validation set of the run by its name; default: what its val/loss is "
        "measured on",
    )
    _add_part_of_data(average)


def _weight(text: str) -> float:
    try:
        return decimal(1e-6, 1e6)(text)
    except argparse.ArgumentTypeError as error:
        try:
            float(text)
        except ValueError:  # perhaps a step that follows --weights
            way_out = "give --weights last, with a number for each STEP and spaces between them"
        else:
            way_out = "leave out a step that is not to count"
        raise argparse.ArgumentTypeError(f"{error}; {way_out}") from None


def _add_part_of_data(parser: argparse.ArgumentParser, *, split: str | None = DEFAULT_SPLIT) -> None:
    """Add the options that say on which part of a dataset a checkpoint is evaluated."""
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default=split,
        help=f"part of the dataset; default: {DEFAULT_SPLIT}",
    )
    parser.add_argument("--tokens", type=whole(1), help="number of tokens, from the split's start; default: all")
    parser.add_argument(
        "--micro-batch", type=whole(1, 1_000_000), default=8, metavar="N", help="samples at a time; default: 8"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    where = "a run (its best step), a step's folder, or RUN/checkpoints/latest"
    parser.add_argument("checkpoint", type=user_path, metavar="CKPT", help=where)
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of a run with megagpt.ema.decay")
