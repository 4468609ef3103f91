"""`megagpt tune RUN.json --space SPACE.json`: search the keys of a run file for the lowest validation loss.

With --find-lr or --transfer its learning rate alone: by one rising rate, or over three widths.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from megagpt.config.batch import batch_plan
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.errors import UserError
from megagpt.terminal import SAVED_AND_WANTS_RESTART, counted, show, typed
from megagpt.train.preemption import TIME_LIMIT, Preemption
from megagpt.tuning.trial import Place

ALIVE = ("-oServerAliveInterval=15", "-oServerAliveCountMax=3")  # options by which ssh notices that a host is gone


def run(args: argparse.Namespace) -> int:
    """Tune, and print where the best run file is. Raises UserError."""
    run_config = load_run_config(args.run_file, args.overrides)
    _check_options(args)
    if args.find_lr is not None:
        find_rate = import_module("megagpt.tuning.rate_test").find_rate
        find_rate(run_config, args.run_file, args.overrides, steps=args.find_lr)
        return 0
    if args.transfer is not None:
        measure = import_module("megagpt.tuning.transfer").measure_transfer
        measure(run_config, args.run_file, args.overrides, steps=args.transfer, folder=_folder(args, run_config))
        return 0
    for package in ("optuna", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(f"tune needs {package}; install with pip install -e '.[tune]', or pip install {package}")
    if args.space is None:
        raise UserError(
            "give --space SPACE.json, a file of keys and values to try, --find-lr or --transfer; see docs/tune.md"
        )
    _check(run_config)
    return _search(args, run_config)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, or that nothing would read. Raises UserError."""
    if args.find_lr is not None and args.transfer is not None:
        raise UserError("--find-lr and --transfer are two commands; give one of the two")
    of_a_study = ("space", "trials", "seed", "time_limit", "parallel", "slurm", "hostfile")
    for given, mode, unused in (
        (args.find_lr, "--find-lr makes one short run", (*of_a_study, "study")),
        (args.transfer, "--transfer makes short runs one after another", of_a_study),
    ):
        for option in unused if given is not None else ():
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise UserError(f"--{name} is of a study, and {mode}; leave one of the two out")
    if args.hostfile is not None and args.slurm is not None:
        raise UserError("--hostfile reaches hosts by ssh, and --slurm by srun; give one of the two")
    if args.hostfile is not None and args.parallel is not None:
        raise UserError(
            f"--hostfile runs a trial on each of its hosts at a time; leave --parallel {args.parallel} out, or remove "
            "hosts from the file"
        )


def _check(run_config: RunConfig) -> None:
    cfg = run_config.megagpt
    if not 0 < cfg.every.eval < cfg.schedule.max_steps:
        way_out = max(1, cfg.schedule.max_steps // 10)
        raise UserError(
            f"megagpt.every.eval={cfg.every.eval} with megagpt.schedule.max_steps={cfg.schedule.max_steps}: trials are "
            f"compared, and ended early, by validation losses on the way; add megagpt.every.eval={way_out}"
        )


def _search(args: argparse.Namespace, run_config: RunConfig) -> int:
    metric, n_trials = run_config.megagpt.early_stopping.monitor, args.trials or 30

    def changed(options: Sequence[str]) -> RunConfig:
        # Read again as a trial reads it: a preset would contradict the keys that a parsed run file has filled in.
        return load_run_config(args.run_file, [*args.overrides, *options])

    def check(options: Sequence[str]) -> None:
        for n_ranks in {place.ranks or 1 for place in places}:
            batch_plan(changed(options).deepspeed, n_ranks)

    space = import_module("megagpt.tuning.space").read_space(args.space, changed)
    same_data = not any(key.startswith("megagpt.data.") for key in space.dimensions)
    if same_data and (refused := import_module("megagpt.train.preflight").refused_data(run_config)):
        raise refused
    stop = Preemption(ctrl_c=True)
    stop.set_time_limit(args.time_limit)
    folder = _folder(args, run_config)
    places = _places(args) if args.hostfile is None else _hosts(args, folder)
    study_module, results = import_module("megagpt.tuning.study"), import_module("megagpt.tuning.results")
    study = study_module.Study(folder, run_config, space, args.seed or 0)
    try:
        done = import_module("megagpt.tuning.run_trials").run_trials(
            study,
            args.run_file,
            args.overrides,
            check=check,
            metric=metric,
            places=places,
            n_trials=n_trials,
            stopped=lambda: stop.requested,
        )
        best = results.write_best(study, args.run_file, args.overrides)
        page = results.write_page(study, metric)
    finally:
        study.close()
    if best is not None:
        trial = study.best()
        show(f"best {metric} {trial.values[0]:.4f} of trial {trial.number}: megagpt train {typed(best)}")
    show(f"{page}: curves, what mattered, all trials; TensorBoard: tensorboard --logdir {typed(folder)}")
    if done:
        return 0
    if stop.reason == TIME_LIMIT:
        show(f"time is up after {len(study.trials)} of {n_trials} trials; the same command continues the study")
        return 0
    show("stopped; the same command continues the study")
    return SAVED_AND_WANTS_RESTART


def _folder(args: argparse.Namespace, run_config: RunConfig) -> Path:
    """Return where results are."""
    return args.study or Path(f"{run_config.megagpt.out_dir}_study")


def _places(args: argparse.Namespace) -> list[Place]:
    """Return where trials run side by side: Slurm jobs, GPUs of this machine, or equal parts of its cores."""
    n = args.parallel or 1
    if args.slurm is not None:
        if shutil.which("srun") is None:
            raise UserError("--slurm: there is no srun on this machine; run it on a login node, or leave it out")
        return [Place(("srun", "--quiet", "--ntasks=1", *shlex.split(args.slurm)), ranks=None)] * n
    gpus = import_module("torch").cuda.device_count()
    have, what = (gpus, "GPUs") if gpus else (len(os.sched_getaffinity(0)), "cores")
    if n > have:
        raise UserError(f"--parallel {n} is more than this machine's {have} {what}; give {have} or less")
    if gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = visible or [str(i) for i in range(gpus)]
        return [Place(environment={"CUDA_VISIBLE_DEVICES": name}) for name in names[:n]]
    return [Place(environment={"OMP_NUM_THREADS": str(have // n)})] * n


def _hosts(args: argparse.Namespace, folder: Path) -> list[Place]:
    """Return a place on each host of a hostfile. Raises UserError if a host is not ready to run trials."""
    hosts = import_module("megagpt.cli.doctor.hosts")
    slots = import_module("megagpt.distributed.hostfile").check_hosts(args.hostfile)
    show(f"looking at {counted(len(slots), 'host')} ...")
    in_study = json.dumps(str(folder / "trials"))
    if findings := hosts.unready_for(args.run_file, [*args.overrides, f"megagpt.out_dir={in_study}"], slots):
        unseen = f"{folder} is not seen there; give --study DIR, a folder of a file system that all hosts share"
        lines = [f"{found.host}: study: {unseen}" if found.check == "out_dir" else str(found) for found in findings]
        raise UserError("no trial was started:\n" + "\n".join(lines))
    agent = ["env", *hosts.exported_variables(), sys.executable, "-m", "megagpt.tuning.host_agent"]
    there = f"{shlex.join(['cd', os.getcwd()])} && {shlex.join(agent)}"
    return [Place((*hosts.SSH, *ALIVE, host, there), host=host, ranks=n) for host, n in slots.items()]
