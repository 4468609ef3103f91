"""`megagpt export CKPT DIR`: write a checkpoint as a Hugging Face folder."""

import argparse
from importlib import import_module
from importlib.util import find_spec

import torch

from megagpt.checkpoint.load import load_model
from megagpt.errors import UserError
from megagpt.terminal import show, typed

NEEDED = ("matplotlib", "safetensors", "tokenizers", "transformers")  # of the extra huggingface


def run(args: argparse.Namespace) -> int:
    """Export a checkpoint on the CPU, and print what the comparison with transformers found."""
    # Before the packages are imported, of which each takes a second.
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}; install with pip install -e '.[huggingface]'")
    export = import_module("megagpt.huggingface.export").export
    loaded = load_model(args.checkpoint, torch.device("cpu"))
    found = export(loaded, args.folder, dtype=args.dtype, license_name=args.license)
    ties = f", the other {found.ties} differ by ties of equally likely tokens" if found.ties else ""
    show(
        f"{args.folder} holds {loaded.step_dir} in {args.dtype}; transformers loads it: logits differ by "
        f"{found.largest:.1e} at most, {found.lines - found.ties:,} of {found.lines:,} lines have the same token ids"
        f"{ties}\nto publish it: hf upload NAME {typed(args.folder)}"
    )
    return 0
