"""Compute the number of steps of a run whose length is given in tokens or in epochs."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from megagpt.config.augmentation import PackingConfig
from megagpt.config.doubling import Doubling, doubling, halved
from megagpt.config.model import ModelConfig
from megagpt.errors import UserError
from megagpt.options import MANY
from megagpt.user_paths import local_path

KEYS = {name: f"megagpt.schedule.{name}" for name in ("max_steps", "max_tokens", "max_epochs")}
FIRST_BATCH = "megagpt.schedule.first_batch"
MOST_EPOCHS = 1e6


def with_steps(ours: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Return our section with max_steps where it has max_tokens or max_epochs; `raw` are DeepSpeed's keys.

    Values that are no numbers are left to the models. Raises ValueError, whose message begins with the key, if two of
    the three are given and differ, or if the data does not tell its epochs.
    """
    schedule = ours.get("schedule")
    given = [
        name for name in ("max_epochs", "max_tokens") if isinstance(schedule, dict) and schedule.get(name) is not None
    ]
    if not given:
        return ours
    assert isinstance(schedule, dict)
    name, known = given[0], schedule.get("max_steps")
    placeholder = {**ours, "schedule": {**schedule, "max_steps": MANY if known is None else known}}
    if len(given) == 2:
        raise ValueError(
            f"{KEYS[name]}={schedule[name]} and {KEYS['max_tokens']}={schedule['max_tokens']} both give the length of "
            "the run; remove one of the two"
        )
    batch: Any = raw.get("train_batch_size")
    seq_len = _seq_len(ours)
    if not (_is_whole(batch) and _is_whole(seq_len) and _is_length(name, schedule[name])):
        return placeholder  # the models tell what is wrong with these numbers
    batch, seq_len = int(batch), int(seq_len)
    batches = _batches(schedule, batch)
    first, least = batches.at(0), batches.total(max(1, batches.stages[-1][0]))  # a ramp has to end
    key, size = ("train_batch_size", f"{batch}") if first == batch else (FIRST_BATCH, f"{first} to {batch}")
    # A run.json also has max_steps, and that of an older megagpt could be less than a step.
    if name == "max_tokens":
        steps = batches.steps_to(-(-int(schedule[name]) // seq_len))
        if int(schedule[name]) < first * seq_len and known is None:
            raise ValueError(
                f"{KEYS[name]}={schedule[name]} is less than the {first * seq_len} tokens of one step, "
                f"{key}={first} x {seq_len}; set {KEYS[name]} to {least * seq_len} or more, or lower {key}"
            )
        made_of = f"{size} x {seq_len} tokens"
    else:
        windows = _windows(ours, schedule, seq_len)
        if windows is None:
            return placeholder
        samples = samples_of_epochs(schedule[name], windows)
        steps = batches.steps_to(samples)
        if samples < first and known is None:
            raise ValueError(
                f"{KEYS[name]}={schedule[name]} is {samples} samples, less than one step, {key}={first}; set "
                f"{KEYS[name]} to {1.01 * least / min(windows):.3g} or more, or lower {key}"
            )
        made_of = f"{size} samples, and an epoch has {' or '.join(map(str, dict.fromkeys(windows)))} samples"
    if known not in (None, steps):
        raise ValueError(
            f"{KEYS[name]}={schedule[name]} makes {steps} steps of {made_of}, and "
            f"{KEYS['max_steps']}={known}; remove one of the two"
        )
    return {**ours, "schedule": {**schedule, "max_steps": steps}}


def _batches(schedule: dict[str, Any], batch: int) -> Doubling:
    """Return the global batch of each step; without the ramp where that is written wrongly, as the models will tell."""
    first: Any = schedule.get("first_batch")
    steps: Any = schedule.get("batch_ramp_steps")
    if _is_whole(first) and _is_whole(steps) and first in halved(batch):
        return doubling(int(steps), int(first), batch)
    return doubling(0, batch, batch)


def samples_of_epochs(epochs: float, windows: list[int]) -> int:
    """Return the samples that reach `epochs`: variants of these `windows` take turns (data/sampler.py)."""
    exact = Fraction(str(epochs))  # 0.1 is a tenth, and not the nearest binary number
    whole = math.floor(exact)
    rounds, rest = divmod(whole, len(windows))
    return rounds * sum(windows) + sum(windows[:rest]) + math.ceil((exact - whole) * windows[rest])


def _windows(ours: dict[str, Any], schedule: dict[str, Any], seq_len: int) -> list[int] | None:
    """Return the samples in an epoch of each variant of the dataset; None if it is written wrongly.

    Where the data is not here but its steps are given, as in a run.json, these are kept: None too.
    """
    data, packing = ours.get("data"), ours.get("packing")
    key = f"{KEYS['max_epochs']}={schedule['max_epochs']}"
    if (kind := packing.get("kind") if isinstance(packing, dict) else None) == "best-fit":
        raise ValueError(
            f"{key} with megagpt.packing.kind={kind}, whose rows are counted only when they are packed; give "
            f"{KEYS['max_tokens']} or {KEYS['max_steps']}, or set megagpt.packing.kind to "
            f"{PackingConfig().kind}-masked"
        )
    train = data.get("train") if isinstance(data, dict) else None
    paths: list[Any] = (
        [one.get("path") for one in train if isinstance(one, dict)] if isinstance(train, list | tuple) else []
    )
    if not paths or not all(isinstance(path, str) for path in paths):
        return None
    if len(paths) > 1:
        raise ValueError(
            f"{key} with {len(paths)} datasets in megagpt.data.train, which are read unequally often; give "
            f"{KEYS['max_tokens']} or {KEYS['max_steps']}"
        )
    try:
        path = Path(local_path(paths[0]))
    except UserError:
        return None  # the models tell why
    tokens = _tokens_of_variants(path)
    if not tokens:
        if schedule.get("max_steps") is not None:
            return None
        raise ValueError(
            f"{key} counts epochs of megagpt.data.train.0.path={path}, where there is no finished dataset; correct "
            f"the path, or give {KEYS['max_tokens']} or {KEYS['max_steps']}"
        )
    windows = [(n - 1) // seq_len - 1 for n in tokens]  # as EpochStream.n_windows
    if min(windows) < 1:
        raise ValueError(
            f"{key} with {path}, whose {min(tokens)} tokens are too few for two samples of {seq_len}; set "
            f"megagpt.data.seq_len to {max(1, (min(tokens) - 1) // 2)}, or build more data"
        )
    return windows


def _tokens_of_variants(dataset: Path) -> list[int]:
    """Read the tokens of each variant of the train split from the manifest; [] if that is not one."""
    try:
        variants = json.loads((dataset / "manifest.json").read_bytes())["splits"]["train"]["variants"]
        return [int(variant["tokens"]) for variant in variants]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _seq_len(ours: dict[str, Any]) -> Any:
    given = [part.get("seq_len") for part in (ours.get("data"), ours.get("model")) if isinstance(part, dict)]
    return next((n for n in given if n is not None), ModelConfig.model_fields["seq_len"].default)


def _is_length(name: str, value: Any) -> bool:
    if name == "max_tokens":
        return _is_whole(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_EPOCHS


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf and int(value) == value
