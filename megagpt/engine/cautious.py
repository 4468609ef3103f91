"""AdamW with cautious weight decay (Chen et al. 2025): only weights that the update brings closer to zero decay.

Plain weight decay also pulls back the weights that the gradient moves away from zero, and so minimizes another function
than the loss. Muon builds on this class.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

# Values that decay at a time, which bounds the memory that it takes.
AT_ONCE = 2**24


class CautiousAdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose decay is cautious if asked."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, cautious: bool = True, **adam: Any) -> None:
        super().__init__(groups, fused=True, **adam)
        self.cautious = cautious

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all groups."""
        self.step_by_adam(self.param_groups)

    def step_by_adam(self, groups: Sequence[dict[str, Any]]) -> None:
        """Update these groups alone."""
        all_groups = self.param_groups
        if self.cautious:
            for group in groups:
                self._decay(group)
            groups = [{**group, "weight_decay": 0.0} for group in groups]
        self.param_groups = list(groups)
        try:
            inspect.unwrap(torch.optim.Adam.step)(self)
        finally:
            self.param_groups = all_groups

    @property
    def skipped(self) -> Tensor | None:
        """1 on the device where this step's update must not be made, as torch's fused kernels read it; else 0, None."""
        return getattr(self, "found_inf", None)

    @property
    def made(self) -> Tensor | float:
        """1 where this step's update is made, 0 where it is skipped."""
        return 1.0 if self.skipped is None else 1.0 - self.skipped

    def _decay(self, group: dict[str, Any]) -> None:
        """Decay a group before its update, whose signs are those of the first moment that this step will have."""
        rate, beta = group["lr"] * group["weight_decay"] * self.made, group["betas"][0]
        for p in group["params"] if group["weight_decay"] else ():
            if p.grad is not None:
                moment = self.state[p].get("exp_avg")
                parts = [x.reshape(-1).split(AT_ONCE) for x in (p.grad, p.grad if moment is None else moment)]
                for weights, gradient, before in zip(p.view(-1).split(AT_ONCE), *parts, strict=True):
                    decay_where_it_shrinks(weights, torch.lerp(before, gradient, 1.0 - beta), rate)


def decay_where_it_shrinks(weights: Tensor, update: Tensor, rate: Tensor | float) -> None:
    """Decay the weights that the update, which is subtracted, brings closer to zero, or leaves where they are."""
    weights.mul_(1.0 - rate * (weights * update >= 0.0))


# DeepSpeed warns of an optimizer whose class is not in this list.
ZERO_SUPPORTED_OPTIMIZERS.append(CautiousAdamW)
