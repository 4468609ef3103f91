"""`megagpt evaluate CKPT [--data DIR]`: compute the loss, perplexity and bits per byte of a checkpoint.

With --tasks another measure of the model takes the place of these: evaluate_tasks.py.
"""

import argparse
import json
from pathlib import Path

import torch

from megagpt.checkpoint.load import LoadedModel, load_model
from megagpt.cli.evaluate_tasks import evaluate_tasks
from megagpt.config.validation_sets import folders_of_sets
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.loader import ValWindows
from megagpt.data.lost_text import lost_text, token_counts, unknown_share
from megagpt.data.manifest import Split
from megagpt.data.packing import PACKING
from megagpt.errors import UserError
from megagpt.guards.out_of_memory import is_out_of_memory
from megagpt.terminal import show, typed
from megagpt.train.evaluate import Evaluation, evaluate, unigram_entropy


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, and print it as text or JSON. Raises UserError."""
    if args.limit and not args.tasks:
        raise UserError(f"--limit {args.limit} is for --tasks; give --tokens N for the first tokens of a dataset")
    if not args.tasks:
        return _evaluate_on_data(args)
    if given := [option for option in ("data", "tokens") if getattr(args, option) is not None]:
        raise UserError(f"--{given[0]} has no effect on --tasks, which have data of their own; remove it")
    return evaluate_tasks(args)


def _evaluate_on_data(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = open_dataset(args.data) if args.data else None
    loaded = load_model(args.checkpoint, device)
    tokenizer, step_dir = loaded.tokenizer, loaded.step_dir
    dataset = given or dataset_of_run(step_dir, args.split)
    windows = windows_of(dataset, loaded, args.split, args.tokens)
    result = evaluation(loaded, windows, args.micro_batch)
    counts = token_counts(windows)
    unknown = unknown_share(counts, tokenizer)
    row = {
        "checkpoint": str(step_dir),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "unigram_entropy": unigram_entropy(counts),
        "tokens": result.tokens,
        "bytes": result.bytes,
        "unknown_tokens": unknown,
    }
    if args.json:
        show(json.dumps(row))
    else:
        show(
            f"{step_dir} on {result.tokens:,} tokens of {dataset.path} ({args.split}):\n"
            f"  loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte\n"
            f"  guessing by token frequency alone would give {row['unigram_entropy']:.4f} nats per token"
        )
        if lost := lost_text(unknown, tokenizer):
            show(f"  {lost}")
        if windows.text_bytes and not windows.text_bytes.by_row:
            show("  the bytes are estimated by the split's mean, because an older data_tools stored none")
    return 0


def windows_of(dataset: Dataset, loaded: LoadedModel, split: Split, tokens: int | None) -> ValWindows:
    """Return the windows that a model is evaluated on. Raises UserError, also for a dataset of another tokenizer."""
    model, tokenizer, step_dir, packing = loaded
    if dataset.manifest.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"dataset {dataset.path} was made with another tokenizer than {step_dir} was trained with; build it again "
            f"with tokenizer={step_dir / 'tokenizer.model'}"
        )
    document_end = tokenizer.eod_id if PACKING[packing.kind].masked else None
    stream = dataset.stream(split)
    return ValWindows(stream, model.cfg.seq_len, tokens, document_end=document_end, option="--tokens ")


def evaluation(loaded: LoadedModel, windows: ValWindows, micro_batch: int) -> Evaluation:
    """Evaluate a model on its device. Raises UserError if --micro-batch does not fit into memory."""
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes()).to(loaded.model.wte.weight.device)
    try:
        return evaluate(loaded.model, windows, token_bytes, micro_batch=min(micro_batch, len(windows)))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--micro-batch {micro_batch} does not fit into memory; give a smaller one") from error


def dataset_of_run(step_dir: Path, split: str) -> Dataset:
    """Open the dataset that a step's run validated on, or trained on for its train split. Raises UserError."""
    data = json.loads((step_dir / "run.json").read_bytes())["megagpt"].get("data")
    if data is None:
        raise UserError(f"the model of {step_dir} was imported, and no data with it; give a dataset by --data DIR")
    sets = folders_of_sets(data["val"])
    if split != "train" and len(sets) > 1:
        listed = ", ".join(f"--data {typed(path)}" for path in sets.values())
        raise UserError(f"the run of {step_dir} has {len(sets)} validation sets; give one of {listed}")
    path = Path(data["train"][0]["path"]) if split == "train" else next(iter(sets.values()))
    if not path.is_dir():
        raise UserError(f"the run of {step_dir} read {path}, which is not here; give its place by --data DIR")
    return open_dataset(path)
