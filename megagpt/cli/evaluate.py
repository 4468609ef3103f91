"""`megagpt evaluate CKPT`: measure a checkpoint on datasets (evaluate_data.py) or on tasks (evaluate_tasks.py)."""

import argparse

from megagpt.cli.evaluate_data import evaluate_on_data
from megagpt.cli.evaluate_tasks import evaluate_tasks
from megagpt.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, and print it as text or JSON. Raises UserError."""
    if args.limit and not args.tasks:
        raise UserError(f"--limit {args.limit} is for --tasks; give --tokens N for the first tokens of a dataset")
    if not args.tasks:
        return evaluate_on_data(args)
    if given := [option for option in ("data", "tokens") if getattr(args, option) is not None]:
        raise UserError(f"--{given[0]} has no effect on --tasks, which have data of their own; remove it")
    return evaluate_tasks(args)
