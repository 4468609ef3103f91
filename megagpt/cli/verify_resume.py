"""`megagpt verify-resume RUN.json`: prove that a resumed run is equal to an uninterrupted one, bit for bit.

A few steps are trained twice: straight, and stopped in the middle and resumed. Each part starts new processes, as after
a real stop, and all write to the same folder, so that even paths agree. The resumed part may have another number of
ranks or other keys: then samples, learning rates and steps must be the same, and losses within a tolerance. This module
is also the program of one rank in a part.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megagpt.checkpoint.commit import committed, damage_of, read_commit
from megagpt.cli.spawn_ranks import failure_of, on_ranks
from megagpt.config.batch import batch_plan, rank_numbers
from megagpt.config.run_file import load_run_config
from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.launcher import launcher_watch
from megagpt.distributed.process_group import init_process_group, is_main, leave
from megagpt.engine.precision import with_supported_dtype
from megagpt.engine.safe_pickle import load_checked
from megagpt.errors import UserError
from megagpt.evaluation.tasks import TASKS
from megagpt.metrics.metrics_file import LOSS_OF_SET
from megagpt.terminal import exit_code_of, show
from megagpt.train.preemption import Preemption
from megagpt.train.trainer import train

# Tolerance of losses, in nats: other ranks add in another order, and 16-bit numbers are rounded.
WITHIN = {"fp32": 1e-4, "bf16": 2**-7, "fp16": 2**-7}
LOSSES = ("train/loss", "val/loss", "val/best_loss")
# Metrics that follow from losses or weights, and are not compared where those have a tolerance.
FOLLOW = ("val/perplexity", "val/bits_per_byte", "optim/grad_norm", TASKS)
# Where a run sends its metrics besides its folder: a test adds no runs to the user's.
TRACKERS = ("tensorboard", "wandb", "csv_monitor", "comet", "megagpt.mlflow")
# What every rank draws for itself.
DRAWS_NOTHING = (
    *("dropout=0.0", "embedding_dropout=null", "attention_dropout=null", "residual_dropout=null"),
    "stochastic_depth=0.0",
)
# The keys that have another value here than in the run file, in all parts.
REPLACED = (
    *("megagpt.out_dir", "megagpt.every", "megagpt.keep", "megagpt.early_stopping.restore_best"),
    *(f"{tracker}.enabled" for tracker in TRACKERS),
)
# Metrics that differ between any two runs.
WALL_CLOCK = ("time", "perf/", "data/wait_seconds_per_step", "cluster/")


def verify_resume(
    run_file: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    ranks: int,
    steps: int,
    then_ranks: int,
    then: Sequence[str],
) -> tuple[list[str], str]:
    """Compare `steps` steps straight with the same steps resumed in the middle; return (differences, the criterion).

    The run file is the user's, with its schedule; only out_dir, the intervals and the retention are replaced, and
    trackers are off. If the second half has other ranks or other keys (`then`), dropout and stochastic depth are off,
    because every rank draws its own. Raises UserError if a part fails.
    """
    out_dir, straight = folder / "run", folder / "straight"
    reshaped = then_ranks != ranks or bool(then)
    ours = [
        *overrides,
        f"megagpt.out_dir={out_dir}",
        'megagpt.every={"log": 1, "eval": 1, "save": 0}',
        'megagpt.keep={"last": 2}',
        "megagpt.early_stopping.restore_best=false",
        *(f"{tracker}.enabled=false" for tracker in TRACKERS),
        *(f"megagpt.regularization.{key}" for key in DRAWS_NOTHING if reshaped),
    ]
    _launch(run_file, ours, ranks, stop_at=steps)
    out_dir.rename(straight)
    _launch(run_file, ours, ranks, stop_at=steps // 2)
    _launch(run_file, [*ours, *then], then_ranks, stop_at=steps)
    if not reshaped:
        return list(what_differs(straight, out_dir)), "the same to the last bit"
    dtypes = [read_commit(committed(run)[-1]).identity.dtype for run in (straight, out_dir)]
    within = max(WITHIN[dtype] for dtype in dtypes)
    differ = [*_metrics_that_differ(straight, out_dir, within), *_position_that_differs(straight, out_dir)]
    return differ, f"the same samples, rates and steps, and losses within {within:.1g} nats"


def _launch(run_file: Path, overrides: Sequence[str], ranks: int, *, stop_at: int) -> None:
    """Train, or resume, until the step `stop_at`, in new processes."""
    done = on_ranks(ranks, __spec__.name, str(run_file), str(stop_at), *overrides)
    if done.returncode:
        raise failure_of(done)


def what_differs(straight: Path, cut: Path) -> Iterator[str]:
    """Yield a line for each difference between two runs' metrics and last checkpoints."""
    yield from _metrics_that_differ(straight, cut, 0.0)
    yield from _state_that_differs(straight, cut)


def _metrics_that_differ(straight: Path, cut: Path, within: float) -> Iterator[str]:
    """Compare metrics to the last bit; if `within` > 0, losses to that many nats, and not what follows from them."""
    expected, found = ({(r["step"], k): v for r in _rows(run) for k, v in r.items()} for run in (straight, cut))
    for step, name in sorted(expected.keys() | found.keys()):
        before, after = expected.get((step, name), math.nan), found.get((step, name), math.nan)
        if name.startswith(WALL_CLOCK) or before == after or (within and name.startswith(FOLLOW)):
            continue
        is_loss = name in LOSSES or name.startswith(LOSS_OF_SET)
        if None in (before, after) or not (is_loss and abs(before - after) <= within):
            yield f"{name} at step {step}: {before} straight, {after} resumed"


def _position_that_differs(straight: Path, cut: Path) -> Iterator[str]:
    """Compare the steps, the samples, and the mixture by which these are drawn."""
    before, after = committed(straight)[-1], committed(cut)[-1]
    one, two = (read_commit(step) for step in (before, after))
    for name in ("step", "samples_seen", "tokens_seen"):
        if getattr(one.state, name) != getattr(two.state, name):
            yield f"{name}: {getattr(one.state, name)} straight, {getattr(two.state, name)} resumed"
    if one.mixture != two.mixture:
        yield f"the mixture: {one.mixture} straight, {two.mixture} resumed"
    yield from _damage(before, after)


def _damage(*steps: Path) -> Iterator[str]:
    yield from filter(None, (damage_of(step, 0, every=1) for step in steps))


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _state_that_differs(straight: Path, cut: Path) -> Iterator[str]:
    """Compare the last checkpoints: their commit records and every file; a pickle is compared by the tensors in it."""
    before, after = committed(straight)[-1], committed(cut)[-1]
    one, two = read_commit(before), read_commit(after)
    if (one.state, one.mixture, one.identity) != (two.state, two.mixture, two.identity):
        yield f"the commit records: {one.state} straight, {two.state} resumed"
    names = sorted({path.name for step in (before, after) for path in step.iterdir()})
    for name in names:
        a, b = before / name, after / name
        # These are hashes of the other files.
        if name == "COMMIT" or name.startswith("manifest."):
            continue
        if not (a.is_file() and b.is_file()):
            yield f"{name} is in only one of the two"
        elif a.read_bytes() != b.read_bytes() and not (name.endswith(".pt") and same(load_checked(a), load_checked(b))):
            yield f"{name} differs"
    yield from _damage(before, after)


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal to the last bit, in each tensor and number at any depth; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        raw = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
        return torch.equal(*raw) if a.numel() else True
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return bool(a == b)


def _one_rank(run_file: str, stop_at: str, *overrides: str) -> int:
    """Run one rank of a part; return its exit code."""
    device = init_process_group()
    with errors_on_every_rank():
        run = load_run_config(Path(run_file), overrides)
    preemption = Preemption(launcher_alive=launcher_watch())
    train(with_supported_dtype(run, device), device, stop_at=int(stop_at), preemption=preemption)
    leave()
    return 0


def _check_then(then: Sequence[str]) -> None:
    """Raise UserError for a key of --then that both halves need as it is: the folder, intervals, no trackers."""
    for item in then:
        key = item.partition("=")[0]
        for replaced in REPLACED:
            if f"{key}.".startswith(f"{replaced}.") or f"{replaced}.".startswith(f"{key}."):
                raise UserError(f"--then {item}: verify-resume sets {replaced} itself, in both halves; remove it")


def run(args: argparse.Namespace) -> int:
    """Print the differences and the verdict; exit code 1 if there are any."""
    _check_then(args.then)
    then_ranks = args.then_ranks or args.ranks
    for ranks, option, keys in ((args.ranks, "--ranks", []), (then_ranks, "--then-ranks", args.then)):
        changed = load_run_config(args.run_file, [*args.overrides, *keys])
        batch_plan(changed.deepspeed, ranks, rank_numbers(ranks, f"give {option} {{}}"))
    with TemporaryDirectory(prefix="verify_resume_") as folder:
        different, agreed = verify_resume(
            args.run_file,
            args.overrides,
            Path(folder),
            ranks=args.ranks,
            steps=args.steps,
            then_ranks=then_ranks,
            then=args.then,
        )
    parts = [f"{args.steps} steps straight and cut after {args.steps // 2}, on {args.ranks} rank(s)"]
    parts += [f"{then_ranks} rank(s)"] if then_ranks != args.ranks else []
    verdict = f"{', then '.join([*parts, *args.then])}: {'NOT ' if different else ''}{agreed}"
    show("\n".join([*different, verdict]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: _one_rank(*sys.argv[1:]), is_main=is_main))
