"""torch.compile, one block at a time: kernels are fused, the names of the weights stay, and compiling takes as long for
2 layers as for 48, since one compilation serves all blocks.
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
    """Whether to compile: what the run file asks, else on CUDA, where compiling for minutes is repaid within the hour.

    The same on every rank, since at stage 3 it decides what is gathered together. Collective.
    Raises UserError, on every rank, if it is asked for and one of their machines could not.
    """
    able = all(gather_objects(_has_compiler()))
    if asked and not able:
        raise UserError(
            "megagpt.compile=true needs a C++ compiler (g++, or what CXX names) and Python's headers on every machine; "
            "install g++ and python3-dev, or set it to false"
        )
    if asked is None and device.type == "cuda" and not able:
        print_rank0(
            "not compiled, so slower: a machine has no C++ compiler or no Python headers; install g++ and python3-dev"
        )
    return able and (device.type == "cuda" if asked is None else asked)


def _has_compiler() -> bool:
    """The one that torch calls, and the header that its wrappers include, as Triton's do beside a GPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include", "posix_prefix"))  # Debian's default scheme names another folder
    return shutil.which(compiler) is not None and (headers / "Python.h").is_file()


def compile_blocks(model: GPT, cache: Path, within: Callable[..., Tensor] | None = None) -> None:
    """In place, before any engine takes the model. What is compiled is kept in the folder `cache` for the next start.

    Shapes are fixed: another batch or length is compiled anew. Generation, whose length grows, stays as it was.
    `within` calls the forward pass that it is given, with the arguments after it, and is compiled with it.
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
