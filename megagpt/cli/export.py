"""`megagpt export CKPT DIR`: write a checkpoint as a Hugging Face folder."""

import argparse
from importlib import import_module

import torch

from megagpt.checkpoint.load import load_model
from megagpt.huggingface.packages import check_installed
from megagpt.terminal import show, typed


def run(args: argparse.Namespace) -> int:
    """Export a checkpoint on the CPU, and print what the comparison with transformers found."""
    check_installed("export", "matplotlib", "safetensors", "tokenizers", "transformers")
    export = import_module("megagpt.huggingface.export").export
    loaded = load_model(args.checkpoint, torch.device("cpu"), ema=args.ema)
    found = export(loaded, args.folder, dtype=args.dtype, license_name=args.license)
    ties = f"; {found.ties:,} differ, where two segmentations are equally likely: harmless" if found.ties else ""
    show(
        f"{args.folder} holds {loaded.step_dir} in {args.dtype}; transformers loads it: logits differ by "
        f"{found.largest:.1e} at most, {found.lines - found.ties:,} of {found.lines:,} lines have the same token ids"
        f"{ties}\nto publish it: hf upload NAME {typed(args.folder)}"
    )
    return 0
