"""Explain a failed allocation: what was being done, what memory was predicted, and what to set instead."""

import resource
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from megagpt.config.run_file import RunConfig
from megagpt.distributed.process_group import rank, world_size
from megagpt.distributed.rank_variables import local_ranks
from megagpt.errors import OwnRankError, UserError
from megagpt.planner.estimate import GIB, Machine, Setting, fastest, settings, vocabulary
from megagpt.planner.gpu_specs import Gpu
from megagpt.planner.memory import PARTS
from megagpt.planner.network import network_of

# By the function that the error went through, the innermost first; a test holds these names to the code's.
DOING = {
    "build_engine": "building the model and its optimizer",
    "train_step": "training a step",
    "evaluate": "evaluating",
    "show_samples": "generating samples",
    "run_tasks": "running tasks",
    "save": "saving",
    "resume": "loading the checkpoint",
}

# Messages of errors that are plain RuntimeErrors.
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # pinned memory, and what CUDA takes for itself
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def explained(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into an OwnRankError.

    The other ranks wait for this one in a collective; the launcher ends them when this rank exits.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OwnRankError(_message(run, device, error)) from error


@contextmanager
def fits_into_memory(option: str, value: int, more: str = "") -> Iterator[None]:
    """Turn a failed allocation into a UserError that names an option; `more` is another way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        way_out = "give a smaller one" if value > 1 else "free memory, or use a machine with more"
        raise UserError(f"{option} {value} does not fit into memory; {way_out}{more}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell by type and message: only torch's GPU allocator has an exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in MESSAGES)


def memory_of(device: torch.device) -> int:
    """Return the bytes that this rank may use: its GPU's, or its share of the machine's memory within RLIMIT_AS."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    share = int(psutil.virtual_memory().total) // local_ranks()
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return share if limit == resource.RLIM_INFINITY else min(limit, share)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on this device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _message(run: RunConfig, device: torch.device, error: BaseException) -> str:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    doing = next((DOING[name] for name in reversed(names) if name in DOING), "starting")
    limit = memory_of(device)
    here = Machine(str(device), Gpu(1e12, limit / GIB, 10.0), world_size(), network_of(None, world_size(), 10.0))
    current, *others = settings(run, here, vocabulary(run)[0])
    if device.type == "cpu":  # where offloading moves nothing
        others = [s for s in others if s.offload == current.offload]
    found = [current, *others]
    parts = ", ".join(f"{part} {getattr(current.memory, part) / GIB:.2f}" for part in PARTS)
    return (
        f"out of memory while {doing}, on rank {rank()}, which may use {limit / GIB:.2f} GiB; predicted: "
        f"{current.total / GIB:.2f} GiB ({parts}, spare {current.spare / GIB:.2f}). {memory_advice(found)}"
        + (
            "; and gradient_accumulation_steps to null, which then follows from the batch"
            if run.deepspeed.gradient_accumulation_steps is not None
            else ""
        )
    )


def memory_advice(found: list[Setting]) -> str:
    """Name the largest smaller micro-batch, or the recompute policy that fits with this one; else what fits at all."""
    current = found[0]
    less = [s for s in found[1:] if s.fits and s.total < 0.95 * current.total]
    alike = [s for s in less if (s.stage, s.offload) == (current.stage, current.offload)]
    smaller = [s.micro_batch for s in alike if s.policy == current.policy and s.micro_batch < current.micro_batch]
    policies = [s.policy for s in alike if s.micro_batch == current.micro_batch]
    ways = [f"train_micro_batch_size_per_gpu to {max(smaller)}"] if smaller else []
    ways += [f'megagpt.recompute.policy to "{policies[0]}"'] if policies else []
    if ways:
        return f"Set {', or '.join(ways)}"
    if (best := fastest([replace(s, fits=s in less) for s in found])) is not None:
        return f"Set {shlex.join(best.keys)}"
    return "No setting fits: take more ranks, or a smaller model"
