"""Watch each rank's memory for growth that does not end."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 1000  # steps in which memory is looked at together

GROWING = 3  # windows in a row


class MemoryWatch:
    """Says, once, that memory grows and grows: by more than the limit from window to window, three times in a row.

    Windows of 1000 steps are compared by the least that each saw, so buffers that come and go do not count,
    nor does what grows once, at the start or at the first evaluation or save.
    """

    KINDS = ("memory", "GPU memory")

    def __init__(self, growth_mib: float) -> None:
        """`growth_mib` per window; 0: never."""
        self._limit, self._lows, self._next, self._said = growth_mib, list[Tensor](), 0, False

    def __call__(self, step: int, mib: Tensor) -> Sequence[str]:
        """mib (world_size, kinds) at this step."""
        if self._limit == 0.0 or self._said:
            return ()
        if step < self._next:
            self._lows[-1] = torch.minimum(self._lows[-1], mib)
            return ()
        self._next = step + WINDOW
        self._lows = [*self._lows[-GROWING - 1 :], mib]
        ended = torch.stack(self._lows[:-1]) if len(self._lows) > 1 else mib.new_zeros(0, *mib.shape)
        growing = (ended.diff(dim=0) > self._limit).all(0) if len(ended) == GROWING + 1 else mib < 0
        for r, kind in growing.nonzero().tolist():
            self._said = True
            return (
                f"the {self.KINDS[kind]} of rank {r} has grown from {ended[0, r, kind]:.0f} to "
                f"{ended[-1, r, kind]:.0f} MiB in {GROWING * WINDOW} steps, and grows on",
            )
        return ()


def memory_mib(device: torch.device) -> Tensor:
    """(2,): what this process holds itself, files that are mapped into it aside, and what it has allocated on a GPU."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    own = sum(float(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10
    gpu = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return torch.tensor([own, gpu], device=device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
