"""`megagpt evaluate CKPT`: measure a checkpoint on datasets, on tasks, or on what it recites."""

import argparse

from megagpt.cli.checkpoint_arguments import DEFAULT_SPLIT
from megagpt.cli.evaluate.data import evaluate_on_data
from megagpt.cli.evaluate.memorization import evaluate_memorization
from megagpt.cli.evaluate.tasks import evaluate_tasks
from megagpt.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, and print it as text or JSON. Raises UserError."""
    if args.tasks and args.memorization:
        raise UserError("--tasks and --memorization are both given; give one at a time")
    if args.limit and not args.tasks:
        way_out = (
            "give --memorization N for N passages"
            if args.memorization
            else "give --tokens N for the first tokens of a dataset"
        )
        raise UserError(f"--limit {args.limit} is for --tasks; {way_out}")
    if not args.tasks and not args.memorization:
        args.split = args.split or DEFAULT_SPLIT
        return evaluate_on_data(args)
    measure = "--tasks" if args.tasks else "--memorization"
    for option in ("data", "split", "tokens"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} has no effect on {measure}, whose data is its own; remove it")
    return evaluate_tasks(args) if args.tasks else evaluate_memorization(args)
