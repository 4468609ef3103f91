"""`megagpt init DATA`: write a run file for a dataset and a machine, with the reason of each choice as a comment."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from megagpt.config.mistakes import shortened
from megagpt.config.parsing import read_json
from megagpt.config.run_file import SECTION
from megagpt.data.manifest import BUILD_DIR, MANIFEST, Manifest, Split, read_manifest
from megagpt.errors import UserError
from megagpt.planner.estimate import CPU_EFFICIENCY, GIB, Machine, machine
from megagpt.planner.gpu_specs import FP32_PEAK, GPUS, Gpu, gpu_named
from megagpt.planner.network import network_of
from megagpt.planner.report import launching
from megagpt.planner.sizing import (
    EPOCHS,
    LARGEST_BATCH,
    MOST_GPUS,
    SMALLEST_BATCH,
    STEPS,
    TOKENS_PER_PARAMETER,
    Choice,
    Data,
    choose,
)
from megagpt.terminal import builder_command, duration, show, typed
from megagpt.tokenizer.tokenizer import padded_vocab_size

MEMORY_SHARE = 0.5  # of a CPU's memory that a run may take
MATRIX = 768  # rows and columns of the matrices whose product is timed


def run(args: argparse.Namespace) -> int:
    """Choose, print the reasons, and write the run file, which must not exist yet."""
    out = args.out or Path(f"{args.data.resolve().name}.jsonc")
    _check_free(out)
    data = _data(args.data)
    on = _machine(args)
    choice, refused = choose(data, on, _dtype(on), args.hours)
    out_dir = f"runs/{out.stem}"
    choice.run(out_dir)
    reasons = _reasons(choice, refused)
    text = _commented(choice.as_raw(out_dir), reasons)
    # A path as Python writes it has no line break, which would end the comment.
    device = "CPU" if on.name == "cpu" else on.name
    head = f"// Written by megagpt init for {data.path!r} and one {device}. Change what you like.\n"
    try:
        with out.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(head + text)
    except OSError as error:
        raise UserError(f"run file {out} cannot be written: {error.strerror}; give another place by --out") from None
    lines = [f"{key.removeprefix(f'{SECTION}.')}: {' '.join(reason)}" for key, reason in reasons.items()]
    show(
        "\n".join(
            [
                *lines,
                f"{out} is written; check it with `megagpt lint {typed(out)}`, train with `megagpt train {typed(out)}`",
            ]
        )
    )
    return 0


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"run file {out} exists, and is not overwritten; give another name by --out, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"run file {out}: there is no folder {out.parent}; make it, or give another place by --out")


def _data(path: Path) -> Data:
    """Read what is needed of the dataset. Raises UserError if it is none, or has no training or validation split."""
    if path.exists() and not _is_dataset(path):
        if _is_run_file(path):
            raise UserError(
                f"{path} is a run file, which `megagpt init` writes; give the folder of a dataset, or train with "
                f"`megagpt train {typed(path)}`"
            )
        below = sorted(path.iterdir()) if path.is_dir() else []
        if near := [str(other) for other in (*below, *path.parents) if _is_dataset(other)]:
            raise UserError(
                f"{path} is not a dataset, but {shortened(', '.join(near))} is; give `megagpt init {typed(near[0])}`"
            )
        raise UserError(
            f"{path} is not a dataset; build one from it with `{builder_command()} build --input {typed(path)} "
            "--out data/mine`, then `megagpt init data/mine`"
        )
    manifest = read_manifest(path)
    train, val = _tokens(path, manifest, "train"), _tokens(path, manifest, "val")
    return Data(str(path), train, val, padded_vocab_size(manifest.tokenizer.vocab_size))


def _is_run_file(path: Path) -> bool:
    if not (path.is_file() and path.suffix in (".json", ".jsonc", ".json5")):
        return False
    try:
        return SECTION in read_json(path)
    except UserError:
        return False


def _is_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, BUILD_DIR))


def _tokens(path: Path, manifest: Manifest, split: Split) -> int:
    found = manifest.splits.get(split)
    if found is None or not found.documents:
        raise UserError(
            f"{path} has no documents in its {split!r} split; build it again with another val_fraction, or with the "
            "text to validate on as --val PATH"
        )
    return found.tokens


def _machine(args: argparse.Namespace) -> Machine:
    """Describe the GPU that the command line names, else this machine's, else its CPU. Raises UserError."""
    if args.gpu is not None or args.gpu_memory or args.tflops:
        if args.cpu:
            raise UserError("--gpu-memory and --tflops describe a GPU; remove them, or --cpu")
        return machine(args.gpu, 1, None, gib=args.gpu_memory, tflops=args.tflops)
    if not args.cpu and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if gpu_named(name) is None:
            raise UserError(
                f"this machine's GPU, {name!r}, is not known; give --gpu-memory GIB and --tflops T of its data sheet, "
                f"or the most similar of {', '.join(GPUS)} by --gpu"
            )
        return machine(name, 1, None)
    memory = psutil.virtual_memory().total * MEMORY_SHARE / GIB
    # The planner counts fp32 as a share of a GPU's 16-bit peak.
    return Machine("cpu", Gpu(_cpu_flops() / FP32_PEAK, memory, 1.0), 1, network_of(None, 1, 1.0), CPU_EFFICIENCY)


def _cpu_flops() -> float:
    """Return the FLOP/s of a matrix product in fp32 on this CPU: the best of five."""
    a, b = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX, MATRIX)
    torch.mm(a, b)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return float(2 * MATRIX**3 / min(seconds))


def _dtype(on: Machine) -> str:
    return "fp32" if on.name == "cpu" else "bf16" if on.gpu.bf16 else "fp16"


def _reasons(choice: Choice, refused: Choice | None) -> dict[str, list[str]]:
    """Return the reason of each choice, in lines, by the dotted key that it stands above."""
    shape, data, on = choice.shape, choice.data, choice.on
    model = [
        f"{choice.params:,} parameters, with the vocabulary of {data.vocab_size:,}: the largest model that fits the",
        f"machine and --hours, and whose {TOKENS_PER_PARAMETER} tokens a parameter are within {EPOCHS} epochs of the "
        f"data's {data.train_tokens:,} tokens.",
    ]
    if choice.against:
        model = [f"{choice.params:,} parameters: the smallest model that is offered,", f"though it {choice.against}."]
    if refused:
        model.append(f"The next larger ({refused.params:,} parameters) {refused.against}.")
    on_cpu, seconds = on.name == "cpu", 3600 * choice.hours
    note = launching(on, choice.params)
    by = f"by `megagpt plan`'s arithmetic for one {on.name}{';' if note else '.'}"
    if on_cpu:
        speed = on.gpu.peak_flops * FP32_PEAK
        by = (
            f"at {speed * CPU_EFFICIENCY:.2g} FLOP/s: {CPU_EFFICIENCY:.0%} of {speed:.2g}, which matrix products reach "
        )
        by += "on this CPU now."
    return {
        "train_batch_size": [
            f"Sequences a step: {choice.tokens_per_step:,} tokens. A power of two that makes about {STEPS:,} steps, "
            f"but at least {SMALLEST_BATCH} sequences,",
            f"and at most {LARGEST_BATCH:,} tokens.",
        ],
        "train_micro_batch_size_per_gpu": [
            f"Sequences at a time: about {choice.estimate.total / GIB:.1f} GiB of memory of "
            f"{on.gpu.memory_gib:.0f} GiB by `megagpt plan`'s arithmetic"
            + ("." if on_cpu else f"; {MOST_GPUS} GPUs can divide the batch.")
        ],
        **({"fp16": [f"{on.name} has no bf16."]} if choice.dtype == "fp16" else {}),
        "optimizer": [
            f"{shape.lr:g} is usual for a width of {shape.n_embd}: the smaller a model, the larger its rate."
        ],
        f"{SECTION}.model": model,
        f"{SECTION}.data": [
            f"Each evaluation reads the first {choice.val_windows * shape.seq_len:,} of {data.val_tokens:,} tokens."
            if choice.val_windows
            else f"Each evaluation reads all {data.val_tokens:,} tokens."
        ],
        f"{SECTION}.schedule": [
            f"{choice.steps:,} steps are {choice.tokens:,} tokens: {choice.tokens / choice.params:.1f} a parameter, "
            f"{choice.epochs:.2f} epochs.",
            f"About {duration(seconds) if seconds > 60 else 'a minute or less'} {by}",
            *([f"{note}."] if note else []),
            "Evaluating and saving come on top; other programs on the machine slow training down.",
        ],
        f"{SECTION}.early_stopping": [
            "Four evaluations without a lower validation loss end the run with the best weights."
        ],
        f"{SECTION}.every": ["About ten evaluations and four saves, in steps."],
    }


def _commented(raw: dict[str, Any], reasons: dict[str, list[str]]) -> str:
    """Return the run file's text: one key a line, in our section too, with its reason above it."""
    lines = []
    for key, value in raw.items():
        if key != SECTION:
            lines += _entry(key, value, reasons.get(key, []), "  ")
    lines.append(f'  "{SECTION}": {{')
    for key, value in raw[SECTION].items():
        lines += _entry(key, value, reasons.get(f"{SECTION}.{key}", []), "    ")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join(["{", *lines, "  }", "}"]) + "\n"


def _entry(key: str, value: Any, reason: list[str], indent: str) -> list[str]:
    written = json.dumps(value, ensure_ascii=False)
    return [*(f"{indent}// {line}" for line in reason), f"{indent}{json.dumps(key)}: {written},"]
