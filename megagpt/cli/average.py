"""`megagpt average STEP STEP ... OUT`: average the weights of several steps, and evaluate each and the average."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megagpt.checkpoint.average import RunningAverage, alike_steps, shares_of
from megagpt.checkpoint.commit import COMMIT, read_commit
from megagpt.checkpoint.commit import folder as checkpoints
from megagpt.checkpoint.load import LoadedModel, load_model
from megagpt.checkpoint.weights_folder import origin_of, write_weights_folder
from megagpt.cli.checkpoint_arguments import DEFAULT_SPLIT
from megagpt.cli.evaluate.data import evaluation, windows_of
from megagpt.cli.evaluate.run_datasets import datasets_of_run, given_datasets, open_given
from megagpt.data.dataset import Dataset
from megagpt.errors import UserError
from megagpt.new_folder import check_free
from megagpt.terminal import show
from megagpt.train.evaluate import Evaluation, mean_of
from megagpt.train_state import EarlyStopping, Health


class Measure(NamedTuple):
    """Holds the datasets that the models are measured on; `why_none` tells why they cannot be opened."""

    datasets: Mapping[str, Dataset]
    weights: Sequence[float]  # of the sets in the run's val/loss, if they have any
    is_val_loss: bool  # measured on what the run's val/loss is
    why_none: str = ""


def run(args: argparse.Namespace) -> int:
    """Write the average as a folder of weights, and print the losses of all on the same tokens."""
    steps = alike_steps(args.steps)
    _check_out(args.folder)
    shares = shares_of(steps, args.weights)
    newest = max(steps, key=lambda step_dir: read_commit(step_dir).state.step)
    measure = _measure(newest, args)
    if measure.why_none:
        show(f"not evaluated: {measure.why_none}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total, losses = RunningAverage(), []

    def add(step_dir: Path, share: float) -> float:
        loaded = load_model(step_dir, device)
        total.add(loaded.model, share)
        return _evaluated(loaded, measure, args).loss

    show(f"{'loss':>8}  {'weight':>6}")
    for step_dir, share in zip(steps, shares, strict=True):
        losses.append(add(step_dir, share))
        show(_line(losses[-1], share, str(step_dir)))
    averaged = load_model(newest, device)
    total.copy_to(averaged.model)
    result = _evaluated(averaged, measure, args)
    sources = {"steps": [str(step.absolute()) for step in steps], "shares": shares}
    _write(args.folder, newest, averaged, sources, _record(measure, args.split, result))
    show(_line(result.loss, 1.0, f"the average, in {args.folder}"))
    if (best := min(losses)) < result.loss:
        show(f"{steps[losses.index(best)]} alone has a lower loss")
    return 0


def _check_out(folder: Path) -> None:
    if (folder / COMMIT).is_file() and (origin := origin_of(folder)):
        kind = "averaged" if origin == "average" else "imported"
        raise UserError(f"{folder} exists and holds an {kind} model, and nothing is written over it; name a new folder")
    if (folder / COMMIT).is_file() or checkpoints(folder).is_dir():
        raise UserError(f"{folder} is one more step, and nothing is written over it; name a new folder after it")
    check_free(folder)


def _measure(step_dir: Path, args: argparse.Namespace) -> Measure:
    """Return what the options name, or else what the run's val/loss is measured on. Raises UserError for --data."""
    if args.data:
        return Measure(given_datasets([args.data], open_given([args.data]), step_dir), [], is_val_loss=False)
    try:
        datasets, weights = datasets_of_run(step_dir, args.split, deciding=True)
    except UserError as error:
        return Measure({}, [], False, str(error))
    is_val_loss = args.split == DEFAULT_SPLIT and args.tokens is None
    return Measure(datasets, weights, is_val_loss)


def _evaluated(model: LoadedModel, measure: Measure, args: argparse.Namespace) -> Evaluation:
    """Measure a model; the loss is NaN without data."""
    if not measure.datasets:
        return Evaluation(math.nan, 0, 0)
    windows = [windows_of(dataset, model, args.split, args.tokens) for dataset in measure.datasets.values()]
    return mean_of([evaluation(model, one, args.micro_batch)[0] for one in windows], measure.weights)


def _record(measure: Measure, split: str, result: Evaluation) -> dict[str, Any] | None:
    """Return what the folder tells of the average's loss, and None if it was not measured or is not finite."""
    if not math.isfinite(result.loss):
        return None
    data = {name: dataset.fingerprint for name, dataset in measure.datasets.items()}
    plain = {"is_val_loss": measure.is_val_loss, "data": data, "split": split}
    return plain | {"tokens": result.tokens, "loss": result.loss}


def _write(
    folder: Path, newest: Path, averaged: LoadedModel, sources: dict[str, Any], measured: dict[str, Any] | None
) -> None:
    """Write the folder, with the run file and the position of the newest step."""
    saved = read_commit(newest)
    val_loss = measured["loss"] if measured is not None and measured["is_val_loss"] else None
    write_weights_folder(
        folder,
        {name: weight.detach().cpu() for name, weight in averaged.model.named_parameters()},
        averaged.tokenizer,
        model=saved.identity.model,
        vocab_size=saved.identity.vocab_size,
        run_file=json.loads((newest / "run.json").read_bytes()),
        kind="average",
        sources=sources | {"evaluation": measured},
        state=replace(saved.state, val_loss=val_loss, stopper=EarlyStopping(), health=Health()),
    )


def _line(loss: float, share: float, what: str) -> str:
    return f"{'-' if math.isnan(loss) else f'{loss:.4f}':>8}  {share:6.3f}  {what}"
