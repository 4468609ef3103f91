"""`megagpt evaluate CKPT --tasks NAME_OR_DIR`: run tasks of lm-evaluation-harness on a checkpoint."""

import argparse
import json

import torch

from megagpt.checkpoint.load import load_model
from megagpt.evaluation.tasks import TaskResults, open_tasks, run_tasks
from megagpt.guards.out_of_memory import fits_into_memory
from megagpt.terminal import print_error, show


def evaluate_tasks(args: argparse.Namespace) -> int:
    """Run tasks, and print their metrics as a table or JSON. Raises UserError."""
    # The package's own command separates names by commas.
    tasks = open_tasks([name for words in args.tasks for name in words.split(",") if name])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, step_dir, _ = load_model(args.checkpoint, device, ema=args.ema)
    with fits_into_memory("--micro-batch", args.micro_batch):
        found = run_tasks(tasks, model, tokenizer, micro_batch=args.micro_batch, limit=args.limit, with_errors=True)
    if found.unspelt:
        print_error(f"warning: {found.what_is_lost()}")
    if args.json:
        show(
            json.dumps(
                {
                    "checkpoint": str(step_dir),
                    "tasks": found.metrics,
                    "standard_errors": found.errors,
                    "documents": found.documents,
                    "higher_is_better": found.higher_is_better,
                    "unspelt_texts": found.unspelt,
                }
            )
        )
    else:
        show("\n".join([f"{step_dir} on {device.type}:", *_table(found)]))
    return 0


def _table(found: TaskResults) -> list[str]:
    """Return a line for each metric of each task; better are higher (+) or lower (-) ones."""
    rows = [("task", "documents", "metric", "better", "value", "standard error")]
    for task, metrics in found.metrics.items():
        for metric, value in metrics.items():
            higher = found.higher_is_better.get(task, {}).get(metric.partition("/")[0])
            error = found.errors.get(task, {}).get(metric)
            rows.append(
                (
                    task,
                    f"{found.documents[task]:,}" if task in found.documents else "",
                    metric,
                    "" if higher is None else "higher" if higher else "lower",
                    f"{value:.4f}",
                    "" if error is None else f"{error:.4f}",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (1, 4, 5)  # columns of numbers
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
