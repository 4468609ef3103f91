"""`megagpt lint RUN.json`: print the mistakes in a run file, its keys that have no effect, and what is missing here."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from megagpt.cli.draw_schedule import schedule_lines
from megagpt.config.batch import batch_plan, check_first_batch, rank_numbers
from megagpt.config.extends import file_with, read_run_files
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.data.training_set import OtherTokenizerError
from megagpt.errors import UserError
from megagpt.lint.linter import Issue, effective, lint_file
from megagpt.planner.estimate import vocabulary
from megagpt.terminal import counted, show
from megagpt.train.preflight import refused_data, refused_start, refused_tasks


def run(args: argparse.Namespace) -> int:
    """Print all findings, and with --effective the run file as it acts; exit code 2 if one is an error."""
    found = lint_file(args.run_file, args.overrides, ranks=args.ranks)
    wrong = any(finding.level == "error" for finding in found)
    shown, drawn = None, list[str]()
    if not wrong:
        run = load_run_config(args.run_file, args.overrides)
        found = [*found, *not_here(run, args.ranks)]
        wrong = any(finding.level == "error" for finding in found)
        if args.schedule and not args.json:
            drawn = schedule_lines(run)
        shown = effective(run, vocabulary(run)[0], args.ranks) if args.effective and not wrong else None
    if args.json:
        rows = [{"level": finding.level, "key": finding.key, "text": finding.text} for finding in found]
        show(json.dumps({"findings": rows} | ({} if shown is None else {"effective": shown})))
    else:
        lines = [f"{_place_of(finding, args)}: {finding}" for finding in found]
        show("\n".join([*(lines or [f"{args.run_file}: no findings"]), *drawn]))
        if shown is not None:
            show(json.dumps(shown, indent=2))
    return 2 if wrong else 0


def not_here(run: RunConfig, ranks: int | None = None) -> Iterator[Issue]:
    """Warn of data or weights that are not on this machine, or unusable, and of a batch that its GPUs do not divide.

    These are no errors, because the run may be for another machine, except data of different tokenizers.
    """
    if why := refused_data(run):
        level: Literal["error", "warning"] = "error" if isinstance(why, OtherTokenizerError) else "warning"
        yield Issue(level, "megagpt.data", f"training here would be refused: {why}")
    if because := refused_start(run):
        yield Issue("warning", "megagpt.init_from", f"training here would be refused: {because}")
    if because := refused_tasks(run.megagpt):
        yield Issue("warning", "megagpt.tasks", f"training here would be refused: {because}")
    gpus = torch.cuda.device_count()
    try:
        n_ranks = ranks or max(1, gpus)
        batch = batch_plan(run.deepspeed, n_ranks, rank_numbers(n_ranks, "train with --nproc {}"))
        check_first_batch(run.megagpt.schedule, batch)
    except UserError as error:
        has = counted(gpus, "GPU") if gpus else "no GPU, so one rank"
        yield Issue("warning", "train_batch_size", f"this machine has {has}: {error}")


def _place_of(finding: Issue, args: argparse.Namespace) -> Path:
    """Return the path of the file that has the key; the run file's own for one that the command line changes."""
    if any(item.partition("=")[0] == finding.key for item in args.overrides):
        return Path(args.run_file)
    return file_with(finding.key, read_run_files(args.run_file))
