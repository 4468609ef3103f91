"""`megagpt evaluate CKPT --memorization [N]`: how much of its training text a checkpoint recites."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from megagpt.checkpoint.commit import read_commit
from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.named_step import step_of
from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.schema import MegaGPTConfig
from megagpt.data.dataset import open_dataset
from megagpt.data.packing import PACKING
from megagpt.data.training_set import TrainingSet
from megagpt.errors import UserError
from megagpt.evaluation.memorization import (
    Recited,
    half_length,
    recited,
    right_tokens,
    training_passages,
    unread_passages,
)
from megagpt.guards.out_of_memory import fits_into_memory
from megagpt.terminal import counted, show


def evaluate_memorization(args: argparse.Namespace) -> int:
    """Let a checkpoint recite passages of its training and validation data, and print the shares. Raises UserError."""
    step_dir = step_of(args.checkpoint)
    cfg, data, step = _samples_of(step_dir)
    packing, half = PACKING[cfg.packing.kind], half_length(cfg.seq_len)
    passages, times = training_passages(data, packing, step, args.memorization, half)
    sets = [open_dataset(one.path) for one in cfg.data.val.values()]
    unread = np.concatenate(
        [unread_passages(one.stream("val"), -(-args.memorization // len(sets)), half) for one in sets]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, *_ = load_model(step_dir, device, ema=args.ema)
    with fits_into_memory("--micro-batch", args.micro_batch):
        right = right_tokens(
            model,
            tokenizer,
            np.concatenate([passages, unread]),
            begins_documents=packing.plan_rows is not None,
            micro_batch=args.micro_batch,
        )
    read = right[: len(passages)]
    baseline = recited(right[len(passages) :]) if len(unread) else None
    if args.json:
        row = {
            "checkpoint": str(step_dir),
            "context": half,
            "recited": half,
            "train": asdict(recited(read)),
            "train_by_times_read": {int(n): asdict(recited(read[times == n])) for n in np.unique(times)},
            "val": None if baseline is None else asdict(baseline),
        }
        show(json.dumps(row))
    else:
        show("\n".join([f"{step_dir}: {half} tokens after {half} tokens, greedy:", *_table(read, times, baseline)]))
    return 0


def _samples_of(step_dir: Path) -> tuple[MegaGPTConfig, TrainingSet, int]:
    """Return the run's section, its samples up to a step, and the step. Raises UserError."""
    saved, raw = read_commit(step_dir), json.loads((step_dir / "run.json").read_bytes())
    if not saved.mixture.batches or "data" not in raw["megagpt"]:
        raise UserError(
            f"the model of {step_dir} was imported or averaged, so that there is no record of what it has read; name "
            "a step that a run has saved"
        )
    try:
        cfg, global_batch = MegaGPTConfig.model_validate(raw["megagpt"]), int(raw["train_batch_size"])
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"{step_dir / 'run.json'} is damaged or of another version: {error}") from error
    needed = (*(one.path for one in cfg.data.train), *(one.path for one in cfg.data.val.values()))
    if missing := [path for path in needed if not path.is_dir()]:
        raise UserError(
            f"the run of {step_dir} read {missing[0]}, which is not here, and only what it read can be recited; "
            "restore it there, or make a link"
        )
    return cfg, open_samples(cfg, global_batch, saved), saved.state.step


def _table(read: NDArray[np.bool_], times: NDArray[np.int64], baseline: Recited | None) -> list[str]:
    """Return a line for the passages read once, twice, 3 to 4 times, 5 to 8 times, and so on."""
    up_to = 2 ** np.ceil(np.log2(times)).astype(np.int64)
    rows = []
    for most in np.unique(up_to).tolist():
        fewest = most // 2 + 1
        name = f"read {counted(most, 'time')}" if fewest >= most else f"read {fewest:,} to {most:,} times"
        rows.append((name, recited(read[up_to == most])))
    rows += [] if baseline is None else [("validation, not read", baseline)]
    lines = [f"  {'':24} {'passages':>8}  {'recited exactly':>15}  {'tokens right':>12}"]
    return lines + [f"  {name:24} {r.passages:>8,}  {r.exactly:>15.2%}  {r.tokens:>12.2%}" for name, r in rows]
