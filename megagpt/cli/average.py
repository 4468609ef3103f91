"""`megagpt average STEP STEP ... OUT`: average the weights of several steps, and evaluate each and the average."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from megagpt.checkpoint.average import RunningAverage, alike_steps, shares_of
from megagpt.checkpoint.commit import COMMIT, read_commit
from megagpt.checkpoint.commit import folder as checkpoints
from megagpt.checkpoint.load import LoadedModel, load_model
from megagpt.checkpoint.weights_folder import write_weights_folder
from megagpt.cli.evaluate_data import datasets_of_run, evaluation, windows_of
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.errors import UserError
from megagpt.new_folder import check_free
from megagpt.terminal import show
from megagpt.train.evaluate import mean_of
from megagpt.train_state import EarlyStopping, Health


def run(args: argparse.Namespace) -> int:
    """Write the average as a folder of weights, and print the losses of all on the same tokens."""
    steps = alike_steps(args.steps)
    if (args.folder / COMMIT).is_file() or checkpoints(args.folder).is_dir():
        raise UserError(f"{args.folder} is one more step, and nothing is written over it; name a new folder after it")
    check_free(args.folder)
    shares = shares_of(steps, args.weights)
    newest = max(steps, key=lambda step_dir: read_commit(step_dir).state.step)
    datasets, weights, why_none = _datasets(newest, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total, losses = RunningAverage(), []

    def loss_of(model: LoadedModel) -> float:
        if not datasets:
            return math.nan
        windows = [windows_of(dataset, model, args.split, args.tokens) for dataset in datasets]
        return mean_of([evaluation(model, one, args.micro_batch)[0] for one in windows], weights).loss

    def add(step_dir: Path, share: float) -> float:
        loaded = load_model(step_dir, device)
        total.add(loaded.model, share)
        return loss_of(loaded)

    show(f"{'loss':>8}  {'weight':>6}")
    for step_dir, share in zip(steps, shares, strict=True):
        losses.append(add(step_dir, share))
        show(_line(losses[-1], share, str(step_dir)))
    averaged = load_model(newest, device)
    total.copy_to(averaged.model)
    losses.append(loss_of(averaged))
    _write(args.folder, newest, averaged, steps, shares, losses[-1])
    show(_line(losses[-1], 1.0, f"the average, in {args.folder}"))
    if why_none:
        show(f"not evaluated: {why_none}")
    elif (best := min(losses)) < losses[-1]:
        show(f"{steps[losses.index(best)]} alone has a lower loss")
    return 0


def _datasets(step_dir: Path, args: argparse.Namespace) -> tuple[list[Dataset], list[float], str]:
    """Return the datasets that the run's val/loss is measured on, and their weights; or why there are none.

    Raises UserError for one that was given.
    """
    if args.data:
        return [open_dataset(args.data)], [], ""
    try:
        datasets, weights = datasets_of_run(step_dir, args.split, deciding=True)
    except UserError as error:
        return [], [], str(error)
    return list(datasets.values()), weights, ""


def _write(
    folder: Path, newest: Path, averaged: LoadedModel, steps: list[Path], shares: list[float], loss: float
) -> None:
    """Write the folder, with the run file and the position of the newest step."""
    saved = read_commit(newest)
    val_loss = loss if math.isfinite(loss) else None
    write_weights_folder(
        folder,
        {name: weight.detach().cpu() for name, weight in averaged.model.named_parameters()},
        averaged.tokenizer,
        model=saved.identity.model,
        vocab_size=saved.identity.vocab_size,
        run_file=json.loads((newest / "run.json").read_bytes()),
        kind="average",
        sources={"steps": [str(step_dir.absolute()) for step_dir in steps], "shares": shares},
        state=replace(saved.state, val_loss=val_loss, stopper=EarlyStopping(), health=Health()),
    )


def _line(loss: float, share: float, what: str) -> str:
    return f"{'-' if math.isnan(loss) else f'{loss:.4f}':>8}  {share:6.3f}  {what}"
