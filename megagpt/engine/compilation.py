"""Compile the model with torch.compile, one block at a time.

One compilation serves all blocks, so compiling takes as long for 2 layers as for 48; the names of the weights stay.
"""

import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import print_rank0
from megagpt.errors import OwnRankError, UserError
from megagpt.model.cache import Append
from megagpt.model.gpt import GPT, Block, Output

KERNELS = "compiled"  # a run's folder of compiled kernels, in its out_dir
COMPILATIONS = 256  # of the blocks' one code object, at most
PLAIN_PATH = re.compile(r"[\w./@%+=:,-]+")


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Tell whether to compile: as the run file asks; by default on CUDA, where minutes of compiling are soon repaid.

    The same on every rank, since at stage 3 it decides which weights are gathered at a time. Collective. Raises
    UserError, on every rank, if compiling was asked for and one of the machines cannot.
    """
    able = all(gather_objects(_has_compiler()))
    if asked and not able:
        raise UserError(
            "megagpt.compile=true needs a C++ compiler (g++, or what CXX names) and Python's headers on every machine; "
            "install g++ and python3-dev, or set megagpt.compile to false"
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

    If it cannot, another folder does, which is printed. Shapes are static: another batch size or length compiles again.
    Generation, whose length grows, runs uncompiled.
    `within`, if given, wraps the forward pass (it is called with it and its arguments) and is compiled with it.
    """
    # First of all, because torch._dynamo sets this variable to a folder of its own when it is imported.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_kernel_folder(cache.absolute()))
    # Each length of a warm-up, with each kind of block and mask, is compiled once; beyond this limit torch raises.
    torch._dynamo.config.recompile_limit = max(COMPILATIONS, torch._dynamo.config.recompile_limit)
    accumulated = torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.config.accumulated_recompile_limit = max(COMPILATIONS, accumulated)
    for block in model.blocks():
        block.forward = _unless_cached(block, within)  # type: ignore[method-assign]


def _kernel_folder(cache: Path) -> Path:
    """Return the first of some folders that can keep kernels. Raises UserError if none can."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    tried = {}
    for folder in (cache, user / "megagpt" / "kernels", Path(tempfile.gettempdir()) / f"megagpt_kernels_{os.getuid()}"):
        tried[folder] = why_no_kernels(folder)
        if not tried[folder]:
            if folder != cache:
                print_rank0(f"compiled kernels are kept in {folder}, not in {cache}: {tried[cache]}")
            return folder
    reasons = "; ".join(f"{folder} {reason}" for folder, reason in tried.items())
    raise OwnRankError(
        f"megagpt.compile has no folder for compiled kernels: {reasons}; set TORCHINDUCTOR_CACHE_DIR to one, or "
        "megagpt.compile to false"
    )


def why_no_kernels(folder: Path) -> str:
    """Return why torch cannot keep compiled kernels in a folder, which is created if needed; empty if it can.

    torch writes the path into a compiler's command line unquoted, and loads what is compiled as a library.
    """
    if not PLAIN_PATH.fullmatch(str(folder)):
        return "has a blank or a sign in its path that the compiler's command line cannot have"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid() and status.st_mode & 0o022:
            return "belongs to another user"  # whoever can write there could give us code to run
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return "is mounted noexec"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def _unless_cached(block: Block, within: Callable[..., Tensor] | None) -> Callable[..., Output]:
    plain = block.forward
    compiled = torch.compile(plain if within is None else partial(within, plain), dynamic=False, fullgraph=True)

    def forward(*inputs: Any, cache: Append | None = None) -> Output:
        return compiled(*inputs) if cache is None else plain(*inputs, cache=cache)

    return forward
