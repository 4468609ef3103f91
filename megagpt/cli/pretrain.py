"""Train: the program of launch/pretrain.py, which runs on every rank, and `megagpt train`, which starts the ranks.

Imports stand inside the functions, so that signals are caught before torch is loaded, and --help is fast.
"""

import argparse
import atexit
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from megagpt.cli.arguments import training_arguments
from megagpt.cli.spawn_ranks import train_on_ranks
from megagpt.distributed.rank_variables import OURS, Place, is_rank, unused_tasks
from megagpt.errors import UserError
from megagpt.open_files import raise_limit
from megagpt.terminal import MISTAKE, SAVED_AND_WANTS_RESTART, YELLOW, exit_code_of, print_error, show, typed
from megagpt.train.preemption import SIGNALS, Preemption
from megagpt.train.run_log import RunLog, is_broken_connection

# Seconds that a rank of ours whose connection broke waits to be ended: the rank that failed has told why.
OUTLIVES_ANOTHER = 30.0


def main() -> NoReturn:
    """Train as the command line describes, and end this process with the exit code."""
    raise_limit()
    args = _arguments(None)
    sys.exit(MISTAKE if args is None else run_rank(args))


def run(args: argparse.Namespace) -> int:
    """Run `megagpt train`: on every GPU of this machine, or on `--nproc` ranks; a launcher's rank is one as it is."""
    if args.sample_report is not None or is_rank(os.environ):
        return run_rank(args)
    preemption = _preemption()
    n_ranks = args.nproc or _gpus()
    if n_ranks <= 1:
        return run_rank(args, preemption)
    fresh = ["--fresh"] if args.fresh else []
    command = [sys.executable, "-m", "megagpt", "train", str(args.run_file), *fresh, *args.overrides]
    return train_on_ranks(n_ranks, command, stopped=lambda: preemption.requested)


def run_rank(args: argparse.Namespace, preemption: Preemption | None = None) -> int:
    """Train as one rank, then leave the process group; only the end of the process may follow."""
    try:
        code = _pretrain(args, preemption)
    except RuntimeError as error:
        if OURS in os.environ and is_broken_connection(error):
            time.sleep(OUTLIVES_ANOTHER)
        raise
    # When the first rank ends, launchers signal the others, which must still end with their own exit code.
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    from megagpt.distributed.process_group import leave

    leave()
    if is_rank(os.environ):
        _end_at_once(code)
    return code


def _end_at_once(code: int) -> NoReturn:
    """End this process without tearing Python down: a thread of gloo's may then abort it, and replace its exit code."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there may be none, or nobody who reads it
            stream.flush()
    os._exit(code)


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code: 0 finished, 2 something the user gave is wrong, 75 saved and to be restarted."""
    args = _arguments(argv)
    return MISTAKE if args is None else _pretrain(args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace | None:
    """Parse the command line; None if it has an option that there is none of, which is printed."""
    args, rest = training_arguments().parse_known_intermixed_args(argv)
    if not rest:
        return args
    from megagpt.cli.unknown_options import no_option

    print_error(f"error: {no_option(args, rest, 'launch/pretrain.py')}")
    return None


def _pretrain(args: argparse.Namespace, preemption: Preemption | None = None) -> int:
    """Train, or only report samples. Returns the exit code."""
    if args.sample_report is not None:
        return exit_code_of(lambda: _sample_report(args))

    stops = preemption or _preemption()
    from megagpt.distributed.process_group import is_main

    with RunLog() as log:
        # Before there is a process group, RANK tells who prints what all ranks raise.
        return exit_code_of(
            lambda: _train(args, stops, log), is_main=lambda: is_main() and os.environ.get("RANK", "0") == "0"
        )


def _preemption() -> Preemption:
    """Catch signals; called before torch is loaded, so that none is missed."""
    from megagpt.distributed.launcher import launcher_watch

    return Preemption(launcher_alive=launcher_watch(), ctrl_c=True)


def _gpus() -> int:
    from megagpt.distributed.process_group import visible_gpus

    return visible_gpus()


def _train(args: argparse.Namespace, preemption: Preemption, log: RunLog) -> int:
    """Meet the other ranks, check what they were given, and train."""
    from megagpt.config.run_file import load_run_config
    from megagpt.distributed.collectives import errors_on_every_rank
    from megagpt.distributed.hostfile import check_hostfile
    from megagpt.distributed.process_group import print_rank0
    from megagpt.distributed.rank_variables import join_launch
    from megagpt.distributed.rendezvous import check_equal_on_ranks, check_shared, meet
    from megagpt.engine.precision import with_supported_dtype

    place = join_launch()
    _check_nproc(args, place)
    check_hostfile()
    device = meet()
    for note in _unused(args, place):
        print_rank0(note)
    with errors_on_every_rank():
        run = load_run_config(args.run_file, args.overrides)
    check_equal_on_ranks(run.given() | {"--fresh": args.fresh}, "give all ranks the same run file, overrides and flags")
    check_shared(run.megagpt.out_dir)
    # DeepSpeed takes seconds to import, so the run file is checked before.
    from megagpt.guards.deepspeed_errors import deepspeed_explained
    from megagpt.guards.out_of_memory import explained
    from megagpt.lint.linter import lint_or_raise
    from megagpt.train.trainer import train

    with errors_on_every_rank():
        warnings = lint_or_raise(run)
    for warning in warnings:
        print_rank0(warning, color=YELLOW)
    run = with_supported_dtype(run, device)
    with explained(run, device), deepspeed_explained(run):
        state = train(run, device, fresh=args.fresh, preemption=preemption, log=log)
    return 0 if state.finished(run.megagpt.schedule.max_steps) else SAVED_AND_WANTS_RESTART


def _check_nproc(args: argparse.Namespace, place: Place) -> None:
    """Refuse to ignore --nproc in a process that is a rank already. It is none where the ranks are still to start."""
    nproc = getattr(args, "nproc", None)
    if nproc and not nproc == place.world_size == 1:
        raise UserError(
            f"--nproc={nproc} starts ranks, but this process is already rank {place.rank} of {place.world_size} by "
            f"{place.launcher or 'RANK and WORLD_SIZE'}; leave --nproc out, or start megagpt train by itself "
            "(`unset RANK WORLD_SIZE`)"
        )


def _unused(args: argparse.Namespace, place: Place) -> list[str]:
    """Return a note for each kind of resource that a run on one rank leaves unused, without being told to."""
    if place.world_size > 1 or getattr(args, "nproc", None):
        return []
    n_gpus, tasks = _gpus(), unused_tasks(os.environ) if place == Place() else ""
    gpus = f"note: this run uses one of {n_gpus} GPUs; `megagpt train {typed(args.run_file)}` uses all of them"
    return [note for note in (gpus if n_gpus > 1 else "", tasks) if note]


def _sample_report(args: argparse.Namespace) -> int:
    from megagpt.cli.sample_report import sample_report
    from megagpt.config.run_file import load_run_config

    show(sample_report(load_run_config(args.run_file, args.overrides), args.sample_report, fresh=args.fresh))
    return 0
