"""`megagpt slurm RUN.json`: submit launch/slurm/pretrain.sbatch with a cluster's names and a signal in time to save."""

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megagpt.config.batch import batch_plan
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.errors import UserError
from megagpt.lint.linter import lint_or_raise
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.terminal import print_error, show
from megagpt.train.preflight import refused_data

SCRIPT = Path("launch/slurm/pretrain.sbatch")
# How long before the time limit the signal comes, while the run's metrics do not show how long it needs.
LEAD_SECONDS = 300
# What a stop may have to wait for -> how many times: an asynchronous write may be in flight when its own write starts.
BEFORE_THE_END = {"perf/eval_seconds": 1, "perf/sample_seconds": 1, "perf/save_seconds": 1, "perf/write_seconds": 2}
# A value in an #SBATCH line ends at a blank and cannot be quoted.
VALUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:/@%+=&|*()\[\]-]*")
OPTION = re.compile(r"[a-z][a-z-]*")
CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def batch_script(
    run_file: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus_per_node: int,
    time: str,
    more: Mapping[str, str],
    sweep: Path | None = None,
    container: str | None = None,
    fresh: bool = False,
) -> str:
    """Return the batch script for this run, or for an array with a task for each line of `sweep`.

    `more` are other options of sbatch. Raises UserError for a run that cannot be trained on these ranks, and for a
    value that sbatch or a shell would take for more than a value.
    """
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT} is not here; go to the checkout's folder, where the job will start too")
    runs = [load_run_config(run_file, overrides)] if sweep is None else list(_swept(run_file, overrides, sweep))
    warnings = dict.fromkeys(_warnings(runs))
    for run in runs:
        batch_plan(run.deepspeed, nodes * gpus_per_node, _fewer_gpus(nodes, gpus_per_node))
    options = {
        "nodes": str(nodes),
        "ntasks-per-node": str(gpus_per_node),
        "gpus-per-node": str(gpus_per_node),
        "time": time,
        "signal": f"USR1@{lead_seconds(runs, limit_seconds(time))}",
    }
    arguments = [str(run_file), *(["--fresh"] if fresh else []), *overrides]
    if sweep is not None:
        options["array"] = f"1-{len(runs)}"
        arguments += ["--sweep", str(sweep)]
    for name in options.keys() & more.keys():
        raise UserError(f"--sbatch {name}={more[name]}: megagpt slurm sets {name}={options[name]} by its own options")
    script = _render(SCRIPT.read_text(encoding="utf-8"), options | dict(more), arguments, container)
    for warning in warnings:
        print_error(warning)
    return script


def _warnings(runs: Sequence[RunConfig]) -> Iterator[str]:
    """Yield what lint warns of, and data that is not here, where the nodes usually read it too. Raises as lint does."""
    for run in runs:
        yield from lint_or_raise(run)
    for run in {run.megagpt.data.model_dump_json(): run for run in runs}.values():
        if why := refused_data(run):
            yield f"warning: training here would be refused: {why}"


def _fewer_gpus(nodes: int, gpus_per_node: int) -> Iterator[tuple[int, str]]:
    """Yield smaller numbers of ranks with the flags that give them: fewer GPUs of each node, then fewer nodes."""
    yield from ((nodes * gpus, f"give --gpus-per-node {gpus}") for gpus in range(gpus_per_node, 0, -1))
    yield from ((n * gpus_per_node, f"give --nodes {n}") for n in range(nodes, 0, -1))
    yield from ((gpus, f"give --nodes 1 --gpus-per-node {gpus}") for gpus in range(gpus_per_node, 0, -1))


def _swept(run_file: Path, overrides: Sequence[str], sweep: Path) -> Iterable[RunConfig]:
    """Yield the run of each line of a sweep. Raises UserError if one is wrong or has another's out_dir."""
    try:
        lines = sweep.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sweep {sweep} cannot be read: {error}") from error
    if not lines:
        raise UserError(f"--sweep {sweep} is empty; write one line of key.path=value words for each task")
    line_of: dict[Path, int] = {}
    for n, line in enumerate(lines, start=1):
        try:
            run = load_run_config(run_file, [*overrides, *line.split()])
        except UserError as error:
            raise UserError(f"{sweep}, line {n}: {error}") from error
        out_dir = run.megagpt.out_dir
        if "megagpt.out_dir=" not in line or out_dir in line_of:
            seen = f"as line {line_of[out_dir]}" if out_dir in line_of else "as the run file"
            raise UserError(f"{sweep}, line {n}: the same megagpt.out_dir={out_dir} {seen}; give each task its own")
        line_of[out_dir] = n
        yield run


def limit_seconds(text: str) -> int:
    """Parse a time as sbatch does: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError for anything else."""
    found = CLOCK.fullmatch(text)
    if found is None:
        raise UserError(f"--time {text} is none of minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S; such as 12:00:00")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    units = (3600, 60, 1) if days is not None or len(parts) == 3 else (60, 1)
    seconds = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if seconds < 60:
        raise UserError(f"--time {text} is less than a minute, Slurm's unit; give 1 (minute) or more")
    return seconds


def lead_seconds(runs: Sequence[RunConfig], limit: int) -> int:
    """Return how long before its time limit a run must be signaled to save in time, in seconds.

    It is twice the longest time that evaluating, sampling and saving took so far. Raises UserError if that is more
    than half of the limit.
    """
    slowest = max(runs, key=_slowest).megagpt.out_dir
    learned = round(2 * max(map(_slowest, runs)))
    if learned > limit / 2:
        raise UserError(
            f"evaluating, sampling and saving took {learned / 2:.0f} s in {slowest}, so the signal would have to come "
            f"{learned} s before the time limit of {limit} s; give --time {-(-2 * learned // 60)} (minutes) or more"
        )
    return max(learned, min(LEAD_SECONDS, limit // 4))


def _slowest(run: RunConfig) -> float:
    """Return the seconds from a signal to the end of the save, by the run's metrics.jsonl; 0 if it has none."""
    slowest = dict.fromkeys(BEFORE_THE_END, 0.0)
    for row in read_rows(run.megagpt.out_dir / METRICS):
        slowest = {name: max(seconds, row.get(name, 0.0)) for name, seconds in slowest.items()}
    return sum(times * slowest[name] for name, times in BEFORE_THE_END.items())


def _render(text: str, options: Mapping[str, str], arguments: Sequence[str], container: str | None) -> str:
    """Return the script with these options of sbatch, the run's arguments, and Python started in the container."""
    for name, value in options.items():
        if not OPTION.fullmatch(name) or not VALUE.fullmatch(value):
            raise UserError(f"--{name}={value!r} is no option of sbatch in one word of letters, digits and signs")
        line = f"#SBATCH --{name}={value}"
        text, n = re.subn(rf"^#SBATCH --{name}=.*$", line, text, flags=re.M)
        if n == 0:
            text = text.replace("\nset -uo pipefail\n", f"\n{line}\nset -uo pipefail\n", 1)
    text = text.replace("\nrun_file=", f'\nset -- {shlex.join(arguments)} "$@"\nrun_file=', 1)
    if container is not None:
        try:
            python = shlex.join([*shlex.split(container), "python"])
        except ValueError as error:
            raise UserError(f"--container {container!r}: {error}; give the words that come before python") from error
        text = re.sub(r"^python=.*$", lambda _: f"python=({python})", text, flags=re.M)
    return text


def submit(script: str) -> str:
    """Submit the script; return what sbatch prints. Raises UserError if sbatch refuses it."""
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch here; --dry-run prints the script, to submit on another machine") from error
    if done.returncode:
        raise UserError(f"sbatch refused the script: {done.stderr.strip()}")
    return done.stdout.strip()


def run(args: argparse.Namespace) -> int:
    """Submit the run; with --dry-run print the script instead."""
    more = {name: value for name in ("partition", "account") if (value := getattr(args, name)) is not None}
    more |= {name: value for name, _, value in (option.partition("=") for option in args.sbatch)}
    script = batch_script(
        args.run_file,
        args.overrides,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        more=more,
        sweep=args.sweep,
        container=args.container,
        fresh=args.fresh,
    )
    if args.dry_run:
        show(script, end="")
    else:
        show(submit(script))
    return 0
