"""Bytes of tensor storages alive on this rank, now and at the peak: what a GPU's allocator would hold, on a CPU too."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation returns, until it is freed. What existed before does not count.

    Scratch space inside one operation is not seen. Tensors on the meta device, where DeepSpeed notes shapes, hold
    nothing. Backward counts too, where it runs in this thread (on a CPU).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tensors((args, kwargs)):
            self._see(given.untyped_storage(), 0)  # or a view of it would count as new
        result = func(*args, **(kwargs or {}))
        for made in tensors(result):
            self._see(made.untyped_storage(), 0 if made.is_meta else made.untyped_storage().nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
