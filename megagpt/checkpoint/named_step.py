"""Find the step that a user names: a run's folder, one step's, or a pointer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagpt.checkpoint.commit import COMMIT, POINTERS, best, committed, pointed, read_commit, run_of
from megagpt.config.mistakes import as_written
from megagpt.config.model import ModelConfig
from megagpt.data.manifest import MANIFEST
from megagpt.errors import UserError
from megagpt.terminal import typed
from megagpt.user_paths import similar_path

HUB = re.compile(r"((openai-community|distilbert)/)?(distil)?gpt2(-\w+)?")  # names of models that others start from


def step_of(path: Path) -> Path:
    """Return the committed step that a user means: a step, `best` or `latest` of a run, or a run's best step."""
    if ".." in path.parts or path.name == "" or str(path) in POINTERS:
        path = path.resolve()  # typed below the run's folder, whose name the path lacks
    if (path / COMMIT).is_file():
        return path
    if path.name in POINTERS and not path.is_dir():
        run = run_of(path)
        step_dir = pointed(run, path.name)
    else:
        run = path.parent if path.name == "checkpoints" else path
        step_dir = best(run) or next(reversed(committed(run)), None)
    if step_dir is None:
        raise UserError(_no_step(path))
    return step_dir


def _no_step(path: Path) -> str:
    ways = "give a run's folder, one of its checkpoints/step_*, or its checkpoints/latest"
    if (path / MANIFEST).is_file():
        return f"{path} is a dataset; {ways}"
    if (path / "config.json").is_file():
        return (
            f"{path} is a Hugging Face folder; make one that megagpt reads by: megagpt import {typed(path)} NEW_FOLDER"
        )
    if path.is_file() and ".json" in path.suffix:
        return f"{path} is a file, perhaps a run file; give the folder of its run, which its megagpt.out_dir names"
    if HUB.fullmatch(str(path)) and not path.exists():
        return (
            f"{path} does not exist, and a model of the Hugging Face hub is not downloaded; fetch it by `hf download "
            f"{path} --local-dir {path.name}`, then: megagpt import {path.name} NEW_FOLDER"
        )
    wrong = "holds no committed checkpoint" if path.exists() else "does not exist"
    if steps := [step_dir.name for step_dir in committed(run_of(path))]:
        ways = f"{run_of(path)} has the steps {', '.join(steps[-5:])}"
    elif near := None if path.exists() else similar_run(path):
        ways = f"did you mean {typed(near)}?"
    return f"{path} {wrong}; {ways}"


def similar_run(path: Path) -> Path | None:
    """Return the run, or the part of one, that is meant by a path whose run does not exist, if a name is near."""
    run = next((path.parents[at] for at, part in enumerate(path.parts[::-1]) if part == "checkpoints"), path)
    run = run.parent if run.name in POINTERS else run
    near = similar_path(run, lambda other: (other / "checkpoints").is_dir() or (other / COMMIT).is_file())
    return near and near / path.relative_to(run)


def starting_step(path: Path, model: Mapping[str, Any], tokenizer: str | None) -> Path:
    """Return the committed step whose weights a new run begins with. Raises UserError if they do not fit its model.

    `path`: as for `step_of`; `model` and `tokenizer` (its sha256, None if it is not known): the new run's, as in its
    identity. The number of positions may differ.
    """
    step_dir = step_of(path)
    was = read_commit(step_dir).identity
    its_model, our_model = ModelConfig.whole(was.model), ModelConfig.whole(model)
    other = [key for key in our_model if key not in ("seq_len", "attention") and its_model[key] != our_model[key]]
    if other:
        its, ours = (", ".join(f"{name}={sizes[name]}" for name in other) for sizes in (its_model, our_model))
        keys = " ".join(f"megagpt.model.{name}={as_written(its_model[name])}" for name in other)
        raise UserError(f"megagpt.init_from={path}: its model has {its}, and this run's {ours}; set {keys}")
    if tokenizer not in (None, was.tokenizer):
        raise UserError(
            f"megagpt.init_from={path}: its tokenizer is another one than the data's; build the data with "
            f"tokenizer={typed(step_dir / 'tokenizer.model')}"
        )
    return step_dir


def check_is_no_step(out_dir: Path) -> None:
    """Raise UserError for a run's folder that is a step's or one of weights: what is named by it would be that step."""
    if (out_dir / COMMIT).is_file():
        raise UserError(
            f"megagpt.out_dir={out_dir} is one step's folder and not a run's; give another, and "
            f"megagpt.init_from={typed(out_dir)} to begin with its weights"
        )
