"""The command-line options of `megagpt tune`."""

import argparse
from collections.abc import Callable

from megagpt.options import MOST_RANKS_HERE, decimal, whole
from megagpt.user_paths import user_path


def tune_options(tune: argparse.ArgumentParser) -> None:
    """Add the options that follow the run file."""
    tune.add_argument(
        "--space",
        type=user_path,
        metavar="SPACE.json",
        help="keys and the values to try (docs/tune.md); default: none",
    )
    tune.add_argument(
        "--study", type=user_path, metavar="DIR", help="where the study is, and is continued; default: OUT_DIR_study"
    )
    tune.add_argument("--trials", type=whole(1, 1_000_000), metavar="N", help="in all; default: 30")
    tune.add_argument("--time-limit", type=decimal(0.01, 1e6), metavar="MINUTES", help="then stop; default: none")
    tune.add_argument("--parallel", type=whole(1, MOST_RANKS_HERE), metavar="N", help="trials at a time; default: 1")
    tune.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="run each trial by srun with these options, in quotes; default: on this machine",
    )
    tune.add_argument(
        "--hostfile",
        type=user_path,
        metavar="HOSTS",
        help="run a trial at a time on each of these hosts, by ssh, on all of its slots; default: on this machine",
    )
    tune.add_argument("--seed", type=whole(0, 1_000_000), help="of the draws; default: 0")
    tune.add_argument(
        "--find-lr",
        nargs="?",
        const=200,
        type=_steps(50),
        metavar="STEPS",
        help="let the learning rate rise over STEPS, 200 if left out, and suggest one; default: a study",
    )
    tune.add_argument(
        "--transfer",
        nargs="?",
        const=100,
        type=_steps(20),
        metavar="STEPS",
        help="find the best rate at a quarter, a half and all of the width, by runs of STEPS, 100 if left out; "
        "default: a study",
    )


def _steps(low: int) -> Callable[[str], int]:
    """Return the type of an optional number of steps, in whose place a key of the run file may stand by mistake."""
    parse = whole(low, 1_000_000)

    def steps(text: str) -> int:
        if "=" in text:
            raise argparse.ArgumentTypeError(f"{text} is a key; write it before this option, or give STEPS as well")
        return parse(text)

    return steps
