"""Report memory that keeps growing on some rank: a leak, before it ends the run."""

import resource
import sys
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

WINDOW = 1000  # steps whose minimum is compared with that of the window before
GROWING = 3  # windows in a row that must grow


class MemoryWatch:
    """Reports, once, memory that grows by more than the limit from window to window, three times in a row.

    Windows of 1000 steps are compared by their minimum, so buffers that come and go do not count, nor does memory that
    grows once, at the start or at the first evaluation or save.
    """

    KINDS = ("memory", "GPU memory")

    def __init__(self, growth_mib: float) -> None:
        """`growth_mib`: the limit per window; 0 turns the report off."""
        self._limit, self._minima, self._next, self._reported = growth_mib, list[Tensor](), 0, False

    def __call__(self, step: int, mib: Tensor) -> Sequence[str]:
        """Take the memory of each rank at this step, mib (world_size, kinds); returns the lines to print."""
        if self._limit == 0.0 or self._reported:
            return ()
        if step < self._next:
            self._minima[-1] = torch.minimum(self._minima[-1], mib)
            return ()
        self._next = step + WINDOW
        self._minima = [*self._minima[-GROWING - 1 :], mib]
        ended = torch.stack(self._minima[:-1]) if len(self._minima) > 1 else mib.new_zeros(0, *mib.shape)
        growing = (ended.diff(dim=0) > self._limit).all(0) if len(ended) == GROWING + 1 else mib < 0
        for r, kind in growing.nonzero().tolist():
            self._reported = True
            return (
                f"{self.KINDS[kind]} of rank {r} keeps growing: from {ended[0, r, kind]:.0f} to "
                f"{ended[-1, r, kind]:.0f} MiB in {GROWING * WINDOW} steps",
            )
        return ()


def memory_mib(device: torch.device) -> Tensor:
    """Return (2,) MiB: this process's own memory, without mapped files, and its allocations on the GPU."""
    used = psutil.Process().memory_info()
    own = (used.rss - getattr(used, "shared", 0)) / 2**20  # Linux counts mapped shards as shared
    gpu = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return torch.tensor([own, gpu], device=device)


def peak_memory(device: torch.device) -> int:
    """Return bytes: the allocator's peak on a GPU, the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
