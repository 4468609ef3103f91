"""`megagpt tune RUN.json --space SPACE.json`: search the keys of a run file for the lowest validation loss."""

import argparse
import os
import shlex
import shutil
import signal
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.errors import UserError
from megagpt.terminal import SAVED_AND_WANTS_RESTART, show, typed
from megagpt.tuning.trial import Place

MINUTE = 60.0


def run(args: argparse.Namespace) -> int:
    """Tune, and print where the best run file is. Raises UserError."""
    run_config = load_run_config(args.run_file, args.overrides)
    if args.find_lr is not None:
        return int(import_module("megagpt.tuning.rate_test").find_rate(run_config, args.run_file, args))
    for package in ("optuna", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(f'tune needs {package}; install with pip install "megagpt[tune]" or pip install {package}')
    if args.space is None:
        raise UserError("give --space SPACE.json, a file of keys and values to try, or --find-lr; see docs/tune.md")
    _check(run_config)
    return _search(args, run_config)


def _check(run_config: RunConfig) -> None:
    cfg = run_config.megagpt
    if not 0 < cfg.every.eval < cfg.schedule.max_steps:
        way_out = max(1, cfg.schedule.max_steps // 10)
        raise UserError(
            f"megagpt.every.eval={cfg.every.eval} with megagpt.schedule.max_steps={cfg.schedule.max_steps}: trials are "
            f"compared, and ended early, by validation losses on the way; add megagpt.every.eval={way_out}"
        )


def _search(args: argparse.Namespace, run_config: RunConfig) -> int:
    study_module, results = import_module("megagpt.tuning.study"), import_module("megagpt.tuning.results")
    metric = run_config.megagpt.early_stopping.monitor
    space = import_module("megagpt.tuning.space").read_space(
        args.space, lambda options: load_run_config(args.run_file, [*args.overrides, *options])
    )
    folder = args.study or Path(f"{run_config.megagpt.out_dir}_study")
    study = study_module.Study(folder, run_config, space, args.seed)
    stop = _Stop()
    try:
        done = import_module("megagpt.tuning.run_trials").run_trials(
            study,
            args.run_file,
            args.overrides,
            metric=metric,
            places=_places(args),
            n_trials=args.trials,
            seconds=None if args.time_limit is None else args.time_limit * MINUTE,
            stopped=stop,
        )
        best = results.write_best(study, args.run_file, args.overrides)
        page = results.write_page(study, metric)
    finally:
        study.close()
    if best is not None:
        trial = study.best()
        show(f"best {metric} {trial.values[0]:.4f} of trial {trial.number}: megagpt train {typed(best)}")
    show(f"{page}: curves, what mattered, all trials; TensorBoard: tensorboard --logdir {typed(folder)}")
    if stop():
        show("stopped; the same command continues the study")
        return SAVED_AND_WANTS_RESTART
    if not done:
        show(f"time is up after {len(study.trials)} of {args.trials} trials; the same command continues the study")
    return 0


class _Stop:
    """Notes Ctrl-C and SIGTERM: the first stops the study with its trials saved."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if not self._asked:
            show("stopping: the running trials save what they have")
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def _places(args: argparse.Namespace) -> list[Place]:
    """Return where trials run side by side: parts of this machine, hosts, or Slurm jobs."""
    if args.slurm is not None:
        if shutil.which("srun") is None:
            raise UserError("--slurm: there is no srun on this machine; run it on a login node, or leave it out")
        prefix = ("srun", "--quiet", "--ntasks=1", *shlex.split(args.slurm))
        return [Place(f"Slurm {i}", prefix) for i in range(args.parallel)]
    gpus = import_module("torch").cuda.device_count()
    if gpus:
        if args.parallel > gpus:
            raise UserError(f"--parallel {args.parallel} is more than this machine's {gpus} GPUs; give {gpus} or less")
        return [Place(f"GPU {i}", environment={"CUDA_VISIBLE_DEVICES": str(i)}) for i in range(args.parallel)]
    cores = len(os.sched_getaffinity(0))
    if args.parallel > cores:
        raise UserError(f"--parallel {args.parallel} is more than this machine's {cores} cores; give {cores} or less")
    threads = str(max(1, cores // args.parallel))
    return [Place(f"part {i}", environment={"OMP_NUM_THREADS": threads}) for i in range(args.parallel)]
