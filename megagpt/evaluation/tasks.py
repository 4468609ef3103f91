"""Run tasks of lm-evaluation-harness on a model: tasks of the package by name, or of a folder of YAML files.

Nothing is fetched: a task's data is on this machine, in files that its YAML names or in the cache of `datasets`.
"""

import io
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megagpt.data.lost_text import UNKNOWN
from megagpt.errors import UserError
from megagpt.evaluation.task_fields import check_fields, explain_fields
from megagpt.guards.out_of_memory import is_out_of_memory
from megagpt.model.gpt import GPT
from megagpt.terminal import counted
from megagpt.tokenizer.tokenizer import Tokenizer

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")  # read when the packages are imported
TASKS = "tasks/"  # begins the names of metrics in a run
SEED = 1234  # of the few-shot examples, as in the package
RESAMPLINGS = 1000  # for the standard error of a metric that has no formula


class Wanted(NamedTuple):
    """A task to load: one of the package by its name, or the settings of a YAML file."""

    name: str
    settings: dict[str, Any] | None = None
    file: Path = Path()


class Tasks(NamedTuple):
    """Opened tasks: their names in order, and what the package makes of them and of groups of them."""

    names: list[str]
    loaded: dict[str, Any]

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each task's documents, which must be equal on all ranks."""
        return {
            name: xxhash.xxh3_128_hexdigest(repr(list(task.eval_docs)).encode())
            for name, task in self.loaded["tasks"].items()
        }


class TaskResults(NamedTuple):
    """Holds a model's metrics by task (or group), and what one must know to read them."""

    metrics: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]  # standard errors, of the metrics that have one
    documents: dict[str, int]
    higher_is_better: dict[str, dict[str, bool | None]]
    unspelt: int  # texts that the tokenizer cannot spell

    def what_is_lost(self) -> str:
        """Tell of the texts that the tokenizer cannot spell."""
        return (
            f"the tokenizer cannot spell {counted(self.unspelt, 'text')} of these tasks: {UNKNOWN} stands in them, so "
            "do not compare their numbers with another tokenizer's"
        )

    def as_metrics(self) -> dict[str, float]:
        """Return the metrics by the names that a run's have."""
        return {f"{TASKS}{task}/{name}": value for task, named in self.metrics.items() for name, value in named.items()}


def open_tasks(names: Sequence[str], option: str = "--tasks ") -> Tasks:
    """Open tasks by name, by YAML file or by the folder of their files. Raises UserError, also for missing data.

    `option` is how the user gave them.
    """
    if not all(names) or not names:
        raise UserError(f"{option}names no task; give a task of lm-evaluation-harness, or a folder of YAML files")
    if find_spec("lm_eval") is None:
        raise UserError(f"{option}{names[0]} needs the package lm-eval; install with pip install -e '.[tasks]'")
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    with _quiet():
        manager_of = import_module("lm_eval.tasks").TaskManager
        wanted = [one for name in names for one in _wanted(name, option)]
        by_name = any(one.settings is None for one in wanted)
        manager = manager_of(include_defaults=by_name)  # reading the package's 14,000 takes seconds
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for one in wanted:
            found = _loaded(manager, one, option)
            if twice := loaded["tasks"].keys() & found["tasks"].keys():
                raise UserError(f"{option}{' '.join(names)} names the task {min(twice)} twice; name it once")
            for part in loaded:
                loaded[part] |= found[part]
    return Tasks([*loaded["tasks"]], loaded)


def _wanted(name: str, option: str) -> Sequence[Wanted]:
    """Return what the package loads for a name: its own task, or the settings in one or several YAML files."""
    path = Path(name).expanduser()
    if path.is_file():
        return [_of_file(path, option)]
    if not path.is_dir():
        if "/" in name or path.suffix in (".yaml", ".yml"):  # no name of the package's
            raise UserError(f"{option}{name} is no {'file' if path.suffix else 'folder'}; correct the path")
        return [Wanted(name)]
    files = sorted(path.rglob("*.yaml"))
    if not files:
        others = sorted(path.rglob("*.yml"))
        way_out = f"rename {others[0]} to {others[0].stem}.yaml" if others else "name another folder"
        raise UserError(f"{option}{name} is a folder without a task, which is a file NAME.yaml; {way_out}")
    plain = {file: _read_yaml(file, option, functions=False) for file in files}
    included = {Path(str(other)).name for settings in plain.values() for other in _listed(settings.get("include"))}
    tasks = []
    for file, settings in plain.items():
        if "task" in settings and "group" not in settings:
            tasks.append(_of_file(file, option))
        elif "group" not in settings and not (file.name in included or file.name.startswith("_")):
            raise UserError(f"{file} has no key task, and no other file includes it; name its task, or move it away")
    if not tasks:
        raise UserError(f"{option}{name} has no file with a key task; add one")
    return tasks


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _of_file(file: Path, option: str) -> Wanted:
    settings = _read_yaml(file, option, functions=True)
    return Wanted(settings["task"], settings, file)


def _read_yaml(file: Path, option: str, *, functions: bool) -> dict[str, Any]:
    """Read a task's file, and with `functions` import those that it names. Data files may lie next to it."""
    load_yaml = import_module("lm_eval.tasks._yaml_loader").load_yaml
    try:
        settings: dict[str, Any] = load_yaml(file, resolve_func=functions, recursive=functions)
    except Exception as error:  # of YAML, of the system, and of what the functions' files do
        raise UserError(f"{file} cannot be read as a task: {_first_lines(error)}; correct it") from error
    if functions and "group" in settings:
        raise UserError(f"{option}{file} is a group of tasks; name its folder, whose tasks are run one by one")
    if functions and "task" not in settings:
        raise UserError(f"{option}{file} has no key task, which names it; add one")
    more = settings.get("dataset_kwargs")
    if functions and isinstance(more, dict) and "data_files" in more:
        settings["dataset_kwargs"] = more | {"data_files": _found_files(more["data_files"], file)}
    return settings


def _found_files(given: Any, file: Path) -> Any:
    """Return data files with those that lie next to the YAML file found there, and not in the current folder."""
    if isinstance(given, dict):
        return {split: _found_files(files, file) for split, files in given.items()}
    if isinstance(given, list):
        return [_found_files(one, file) for one in given]
    beside = file.parent / str(given)
    if beside.is_file():
        return str(beside.absolute())
    if not any(sign in str(given) for sign in "*?[:") and not Path(given).expanduser().is_file():
        raise UserError(f"{file} reads {given}, which is neither next to it nor in the current folder; restore it")
    return given


def _loaded(manager: Any, wanted: Wanted, option: str) -> dict[str, Any]:
    name, settings, file = wanted
    if settings is None and name not in manager.task_index:
        near = get_close_matches(name, manager.all_tasks, n=1, cutoff=0.7)
        meant = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them"
        raise UserError(f"{option}{name} is no task of lm-evaluation-harness, no folder and no YAML file; {meant}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, Any] = manager.load([name if settings is None else _read_now(settings, folder)])
    except ConnectionError as error:
        raise UserError(
            f"the data of task {name} is not on this machine, and nothing is downloaded unasked "
            f"({_first_lines(error)}); to download it once, set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 for the "
            "same command; or name a task with data files of its own"
        ) from error
    except OSError as error:
        raise UserError(
            f"the data of task {name} cannot be read, or its copy not be written: {_first_lines(error)}; free disk "
            "space, or set TMPDIR and HF_HOME to folders that can be written"
        ) from error
    except (StopIteration, IndexError) as error:  # there is no first document, or no first letter of an answer
        raise UserError(
            f"task {name} has no documents, or one with an empty answer or with a target beyond its choices, which are "
            "counted from 0; correct its data"
        ) from error
    except Exception as error:  # a task is a program of its own
        if settings is not None and "class" not in settings:
            explain_fields(error, settings, file)
        raise UserError(f"task {name} cannot be opened: {_first_lines(error)}; correct its file or its data") from error
    for task in found["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "images or sound" if getattr(task, "MULTIMODAL", False) else "a run of the code that a model writes"
            raise UserError(f"task {task.task_name} needs {what}, which this command does not do; name another task")
        if settings is not None and "class" not in settings:  # the package's own tasks were tried by others
            check_fields(task, file)
    return found


def _read_now(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Let `datasets` read a task's own files now: it knows those in its cache by path and time of change alone."""
    if "data_files" not in (settings.get("dataset_kwargs") or {}):
        return settings
    return settings | {"dataset_kwargs": {"cache_dir": folder, "keep_in_memory": True} | settings["dataset_kwargs"]}


def run_tasks(
    tasks: Tasks,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    micro_batch: int,
    limit: int | None = None,
    with_errors: bool = False,
) -> TaskResults:
    """Run tasks on a model, on each one's first `limit` documents. Collective: the ranks divide the scoring.

    `with_errors` also estimates standard errors. Raises UserError, the same on every rank, for a task's mistake.
    """
    evaluate = import_module("lm_eval.evaluator").evaluate
    lm = import_module("megagpt.evaluation.harness").HarnessModel(model, tokenizer, micro_batch=micro_batch)
    for task in tasks.loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)  # the same examples each time
    with _quiet(), _own_generators():
        try:
            found = evaluate(
                lm,
                tasks.loaded,
                limit=limit,
                bootstrap_iters=RESAMPLINGS if with_errors else 0,
                log_samples=False,
            )
        except Exception as error:  # of what a task's own functions do
            if isinstance(error, UserError) or error is lm.failure or is_out_of_memory(error):
                raise
            raise UserError(f"the tasks {', '.join(tasks.names)} cannot be run: {_first_lines(error)}") from error
    return _results(found, len(lm.unspelt))


def _results(found: dict[str, Any], unspelt: int) -> TaskResults:
    """Sort what the package returns, whose metrics are named METRIC,FILTER and METRIC_stderr,FILTER."""
    metrics: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, by_name in (found["results"] | found.get("groups", {})).items():
        for key, value in by_name.items():
            metric, _, chosen = key.partition(",")
            if not chosen or isinstance(value, str) or value is None:  # an alias, or N/A
                continue
            into = errors if metric.endswith("_stderr") else metrics
            name = metric.removesuffix("_stderr") + ("" if chosen == "none" else f"/{chosen}")
            into.setdefault(task, {})[name] = float(value)
    documents = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return TaskResults(metrics, errors, documents, found["higher_is_better"], unspelt)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's and its packages' log lines and bars out of ours."""
    was = logging.root.manager.disable
    logging.disable(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks a pool for each standard error
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(was)


@contextmanager
def _own_generators() -> Iterator[None]:
    """Give tasks the same random numbers each time, and the caller its generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
