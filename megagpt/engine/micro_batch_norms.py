"""Gradient norms of single micro-batches, which ZeRO and accumulation add up before a norm is taken.

A hook of each parameter sees its gradient of one backward pass, on this rank, before DeepSpeed does anything with it:
so it is the same at every ZeRO stage. Nothing is read from the device.
"""

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from torch import Tensor


class MicroBatchNorms:
    """Adds up the squared norms of a step's micro-batches on the device, if asked."""

    def __init__(self, engine: Engine, device: torch.device, *, wanted: bool) -> None:
        self._total = torch.zeros((), device=device)
        self._engine = engine
        for parameter in engine.module.parameters() if wanted else ():
            parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self._total.add_(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square())

    def take(self) -> Tensor:
        """Return the mean squared norm of the micro-batches since the last call, or 0 if it is not wanted."""
        # DeepSpeed divides the loss of each micro-batch by their number.
        mean = self._total * self._engine.gradient_accumulation_steps()
        self._total.zero_()
        return mean
