"""torch.compile, one block at a time: kernels are fused, the names of the weights stay, and compiling takes as long for
2 layers as for 48, since one compilation serves all blocks.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megagpt.errors import UserError
from megagpt.model import GPT, Block, KeyValueCache

COMPILERS = ("c++", "g++", "clang++")  # one of them is needed on a CPU, and by Triton's launchers beside a GPU


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: what the run file asks, else on CUDA, where compiling for minutes is repaid within the hour.

    Raises UserError if it is asked for and there is no C++ compiler.
    """
    able = "CXX" in os.environ or any(shutil.which(name) for name in COMPILERS)
    if asked and not able:
        raise UserError("megagpt.compile=True needs a C++ compiler; install g++, or set it to false")
    return able and (device.type == "cuda" if asked is None else asked)


def compile_blocks(model: GPT, cache: Path) -> None:
    """In place, before any engine takes the model. What is compiled is kept in the folder `cache` for the next start.

    Shapes are fixed: another batch or length is compiled anew. Generation, whose length grows, stays as it was.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    for block in model.blocks():
        block.forward = _unless_cached(block)  # type: ignore[method-assign]


def _unless_cached(block: Block) -> Callable[..., Tensor]:
    plain, compiled = block.forward, torch.compile(block.forward, dynamic=False, fullgraph=True)

    def forward(x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        return compiled(x, mask) if cache is None else plain(x, mask, cache)

    return forward
