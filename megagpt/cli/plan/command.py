"""`megagpt plan RUN.json`: estimate memory, communication and time, or find the largest micro-batch by --probe."""

import argparse
import json

import torch

from megagpt.cli.plan.micro_batch_search import search, search_report
from megagpt.config.batch import batch_plan, check_first_batch, rank_numbers
from megagpt.config.run_file import load_run_config
from megagpt.errors import UserError
from megagpt.lint.linter import lint_or_raise
from megagpt.planner.estimate import machine, micro_batches, settings, vocabulary, without_bf16
from megagpt.planner.gpu_specs import gpu_named
from megagpt.planner.report import as_json, plan_report
from megagpt.terminal import print_error, show


def run(args: argparse.Namespace) -> int:
    """Print the plan as a table or JSON; with --probe, the largest micro-batch that fits on this machine."""
    if args.memory and not args.probe:
        raise UserError("--memory limits the steps that --probe takes; add --probe, or choose --gpu")
    run = load_run_config(args.run_file, args.overrides)
    for warning in lint_or_raise(run):
        print_error(warning)
    batch = batch_plan(run.deepspeed, args.ranks, rank_numbers(args.ranks, "give --ranks {}"))
    check_first_batch(run.megagpt.schedule, batch)
    on = machine(
        _gpu(args),
        args.ranks,
        args.network,
        args.efficiency,
        gib=args.gpu_memory,
        tflops=args.tflops,
        gpus_per_host=args.gpus_per_host,
    )
    vocab = vocabulary(run)
    if args.probe:
        candidates = micro_batches(run, args.ranks)
        tries = search(args.run_file, args.overrides, candidates, vocab[0], ranks=args.ranks, gib=args.memory)
        show(search_report(tries, run))
        return 0
    already = without_bf16(run, on.gpu)
    run = run.changed(*already)
    found = list(settings(run, on, vocab[0]))
    tokens = args.tokens or run.tokens(run.megagpt.schedule.max_steps)
    if args.json:
        show(json.dumps(as_json(on, vocab, found, tokens)))
    else:
        show(plan_report(run, on, vocab, found, tokens, already))
    return 0


def _gpu(args: argparse.Namespace) -> str | None:
    """Return the name of the GPU to plan for; None for one that is given by its memory and peak."""
    if args.gpu is not None or args.gpu_memory or args.tflops:
        return None if args.gpu is None else str(args.gpu)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return gpu_named(here) or "H100"
