"""`megagpt evaluate CKPT`: measure a checkpoint on datasets, on tasks, or on what it recites (evaluate_*.py)."""

import argparse

from megagpt.cli.evaluate_data import evaluate_on_data
from megagpt.cli.evaluate_memorization import evaluate_memorization
from megagpt.cli.evaluate_tasks import evaluate_tasks
from megagpt.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, and print it as text or JSON. Raises UserError."""
    if args.limit and not args.tasks:
        raise UserError(f"--limit {args.limit} is for --tasks; give --tokens N for the first tokens of a dataset")
    if not args.tasks and not args.memorization:
        return evaluate_on_data(args)
    measure = "--tasks" if args.tasks else "--memorization"
    for option in ("memorization", "data", "tokens") if args.tasks else ("data", "tokens"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} has no effect on {measure}, whose data is its own; remove it")
    return evaluate_tasks(args) if args.tasks else evaluate_memorization(args)
