"""Measure a checkpoint on datasets: loss, perplexity and bits per byte of each, and of each source in it."""

import argparse
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from megagpt.checkpoint.load import LoadedModel, load_model
from megagpt.cli.evaluate.loss_in_run import loss_in_run
from megagpt.cli.evaluate.run_datasets import datasets_of_run, given_datasets, open_given
from megagpt.data.dataset import Dataset
from megagpt.data.loader import ValWindows
from megagpt.data.lost_text import lost_text, token_counts, unknown_share
from megagpt.data.manifest import Split
from megagpt.data.packing import PACKING
from megagpt.errors import UserError
from megagpt.guards.out_of_memory import fits_into_memory
from megagpt.terminal import counted, show
from megagpt.train.evaluate import Evaluation, evaluate_by_source, mean_of, unigram_entropy

MOST_SOURCES = 20  # of a dataset, that the text lists


class Measured(NamedTuple):
    """The results on a dataset."""

    dataset: Dataset
    result: Evaluation
    sources: dict[str, Evaluation]  # empty if there is one alone
    unigram_entropy: float
    unknown_tokens: float
    bytes_are_estimated: bool


def evaluate_on_data(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint on the split of one or several datasets, and print the results as text or JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before the model, which takes longer; a single word may be the name of one of the run's sets.
    given = open_given(args.data or ())
    loaded = load_model(args.checkpoint, device, ema=args.ema)
    datasets, weights = (
        (given_datasets(args.data, given, loaded.step_dir), [])
        if args.data
        else datasets_of_run(loaded.step_dir, args.split)
    )
    # All of them first: the last one may be refused.
    windows = {name: windows_of(dataset, loaded, args.split, args.tokens) for name, dataset in datasets.items()}
    found = {name: _measured(args, loaded, datasets[name], windows[name]) for name in datasets}
    if len(found) == 1:
        _show_one(args, loaded, next(iter(found.values())))
    else:
        mean = mean_of([one.result for one in found.values()], weights)
        _show_all(args, loaded, found, mean, "mean by weights" if weights else "mean over tokens")
    if not (args.json or args.data or args.tokens or args.ema) and args.split == "val":
        tokens = {name: one.result.tokens for name, one in found.items()}
        if line := loss_in_run(loaded.step_dir, tokens):
            show(f"  {line}")
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


def evaluation(loaded: LoadedModel, windows: ValWindows, micro_batch: int) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Evaluate a model on its device, also by source. Raises UserError if --micro-batch does not fit into memory."""
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes()).to(loaded.model.wte.weight.device)
    with fits_into_memory("--micro-batch", micro_batch):
        return evaluate_by_source(loaded.model, windows, token_bytes, micro_batch=min(micro_batch, len(windows)))


def _measured(args: argparse.Namespace, loaded: LoadedModel, dataset: Dataset, windows: ValWindows) -> Measured:
    result, sources = evaluation(loaded, windows, args.micro_batch)
    counts = token_counts(windows)
    return Measured(
        dataset,
        result,
        sources if len(sources) > 1 else {},
        unigram_entropy(counts),
        unknown_share(counts, loaded.tokenizer),
        windows.text_bytes is not None and not windows.text_bytes.by_row,
    )


def _show_one(args: argparse.Namespace, loaded: LoadedModel, one: Measured) -> None:
    if args.json:
        show(json.dumps({"checkpoint": str(loaded.step_dir)} | _row(one)))
        return
    result = one.result
    lines = [
        f"{loaded.step_dir} on {result.tokens:,} tokens of {one.dataset.path} ({args.split}):",
        f"  loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte",
        f"  guessing by token frequency alone would give {one.unigram_entropy:.4f} nats per token",
        *(_table(_lines_of_sources(one)) if one.sources else []),
    ]
    show("\n".join([*lines, *_remarks([one], loaded)]))


def _show_all(
    args: argparse.Namespace, loaded: LoadedModel, found: Mapping[str, Measured], mean: Evaluation, label: str
) -> None:
    if args.json:
        sets = {name: {"data": str(one.dataset.path)} | _row(one) for name, one in found.items()}
        show(json.dumps({"checkpoint": str(loaded.step_dir), "sets": sets, "mean": _numbers(mean)}))
        return
    rows = []
    for name, one in found.items():
        where = "" if name == str(one.dataset.path) else f" ({one.dataset.path})"
        rows += [(*_line(f"{name}{where}", one.result), f"{one.unigram_entropy:.4f}"), *_lines_of_sources(one)]
    lines = [f"{loaded.step_dir} on {counted(len(found), 'dataset')} ({args.split}):"]
    lines += _table([*rows, _line(label, mean)])
    show("\n".join([*lines, *_remarks(list(found.values()), loaded)]))


def _numbers(result: Evaluation) -> dict[str, Any]:
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }


def _row(one: Measured) -> dict[str, Any]:
    row = _numbers(one.result) | {"unigram_entropy": one.unigram_entropy, "unknown_tokens": one.unknown_tokens}
    return row | ({"sources": {name: _numbers(found) for name, found in one.sources.items()}} if one.sources else {})


# The last: of guessing by token frequency alone, of whole datasets.
HEAD = ("", "loss", "perplexity", "bits per byte", "tokens", "loss by frequency")


def _line(name: str, result: Evaluation) -> tuple[str, ...]:
    numbers = (f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.bits_per_byte:.4f}", f"{result.tokens:,}")
    return (name, *numbers)


def _lines_of_sources(one: Measured) -> list[tuple[str, ...]]:
    """Return a line for each source, those with the most tokens first."""
    ordered = sorted(one.sources.items(), key=lambda item: -item[1].tokens)
    lines = [_line(f"  source {name}", result) for name, result in ordered[:MOST_SOURCES]]
    left_out = len(ordered) - MOST_SOURCES
    return [*lines, (f"  and {counted(left_out, 'source')} more, which --json lists", "", "", "", "")][
        : len(lines) + (left_out > 0)
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    width = max(map(len, rows))
    rows = [(*row, *[""] * (width - len(row))) for row in (HEAD[:width], *rows)]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"  {name:<{first}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        for name, *cells in rows
    ]


def _remarks(found: list[Measured], loaded: LoadedModel) -> list[str]:
    lines = [lost_text(max(one.unknown_tokens for one in found), loaded.tokenizer)]
    if any(one.bytes_are_estimated for one in found):
        lines.append("the bytes are estimated by the split's mean, because an older data_tools stored none")
    return [f"  {line}" for line in lines if line]
