"""The datasets that a checkpoint is measured on: those of its run, and those that --data names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.config.validation_sets import UNNAMED, sets_of
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.manifest import MANIFEST
from megagpt.errors import UserError


def open_given(paths: Sequence[Path]) -> dict[Path, Dataset]:
    """Open what --data names, but for a word that may be a validation set of the run. Raises UserError."""
    return {path: open_dataset(path) for path in paths if (path / MANIFEST).is_file() or len(path.parts) > 1}


def given_datasets(paths: Sequence[Path], given: Mapping[Path, Dataset], step_dir: Path) -> dict[str, Dataset]:
    """Return the datasets of --data by what the user called them; `given` are open already. Raises UserError."""
    section = _section(step_dir)
    sets = {name: Path(one["path"]) for name, one in sets_of(section).items()} if section.get("data") else {}
    datasets = {str(path): _named(path, given, sets, step_dir) for path in paths}
    by_data: dict[str, str] = {}
    for name, dataset in datasets.items():
        if (twin := by_data.setdefault(dataset.fingerprint, name)) != name:
            raise UserError(f"--data {twin} and --data {name} are one dataset; remove one")
    return datasets


def _named(path: Path, given: Mapping[Path, Dataset], sets: Mapping[str, Path], step_dir: Path) -> Dataset:
    """Return the dataset of a folder, or of the run's validation set of this name."""
    if (name := str(path)) not in sets:
        if path not in given and any(sets):
            names = ", ".join(sets)
            raise UserError(f"--data {path} is no dataset, nor a validation set of the run, which has {names}")
        return given[path] if path in given else open_dataset(path)
    of_the_run = _of_the_run(sets[name], step_dir)
    if path in given and given[path].fingerprint != of_the_run.fingerprint:
        raise UserError(
            f"--data {name} is a dataset here and another one of the run, {of_the_run.path}; give {path.resolve()} or "
            f"{of_the_run.path.resolve()}"
        )
    return of_the_run


def datasets_of_run(step_dir: Path, split: str, *, deciding: bool = False) -> tuple[dict[str, Dataset], list[float]]:
    """Open the validation sets of a step's run, or for its train split its first training dataset. Raises UserError.

    Returns them by name, and their weights in val/loss, if they have any. With `deciding` those that it is measured on.
    """
    section = _section(step_dir)
    if section.get("data") is None:
        raise UserError(f"the model of {step_dir} was imported, and no data with it; give a dataset by --data DIR")
    if split == "train":
        return {UNNAMED: _of_the_run(Path(section["data"]["train"][0]["path"]), step_dir)}, []
    sets = sets_of(section, deciding=deciding)
    weights = [one["weight"] for one in sets.values() if one.get("weight") is not None]
    return {name: _of_the_run(Path(one["path"]), step_dir) for name, one in sets.items()}, weights


def _of_the_run(path: Path, step_dir: Path) -> Dataset:
    if not path.is_dir():
        raise UserError(f"the run of {step_dir} read {path}, which is not here; give its place by --data DIR")
    return open_dataset(path)


def _section(step_dir: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((step_dir / "run.json").read_bytes())["megagpt"]
    return section
