"""Compile the model with torch.compile, one block at a time.

One compilation serves all blocks, so compiling takes as long for 2 layers as for 48; the names of the weights stay.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import print_rank0
from megagpt.errors import UserError
from megagpt.model.gpt import GPT, Block, KeyValueCache


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Tell whether to compile: as the run file asks; by default on CUDA, where minutes of compiling are soon repaid.

    The same on every rank, since at stage 3 it decides which weights are gathered at a time. Collective. Raises
    UserError, on every rank, if compiling was asked for and one of the machines cannot.
    """
    able = all(gather_objects(_has_compiler()))
    if asked and not able:
        raise UserError(
            "megagpt.compile=true needs a C++ compiler (g++, or what CXX names) and Python's headers on every machine; "
            "install g++ and python3-dev, or set it to false"
        )
    if asked is None and device.type == "cuda" and not able:
        print_rank0(
            "torch.compile is off, so training is slower: a machine has no C++ compiler or no Python headers; "
            "install g++ and python3-dev"
        )
    return able and (device.type == "cuda" if asked is None else asked)


def _has_compiler() -> bool:
    """Look for the compiler that torch calls, and the header that its wrappers include, as Triton's do on a GPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include", "posix_prefix"))  # Debian's default scheme names another folder
    return shutil.which(compiler) is not None and (headers / "Python.h").is_file()


def compile_blocks(model: GPT, cache: Path, within: Callable[..., Tensor] | None = None) -> None:
    """Compile the blocks in place, before an engine takes the model; the folder `cache` keeps kernels for later starts.

    Shapes are static: another batch size or length compiles again. Generation, whose length grows, runs uncompiled.
    `within`, if given, wraps the forward pass (it is called with it and its arguments) and is compiled with it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    for block in model.blocks():
        block.forward = _unless_cached(block, within)  # type: ignore[method-assign]


def _unless_cached(block: Block, within: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    plain = block.forward
    compiled = torch.compile(plain if within is None else partial(within, plain), dynamic=False, fullgraph=True)

    def forward(x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        return compiled(x, mask) if cache is None else plain(x, mask, cache)

    return forward
