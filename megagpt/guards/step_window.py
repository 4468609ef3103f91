"""Whether steps were sound: finite, and not far above the steps before them. Pure, and the same on host and device.

A history is (2, n): loss (nats per token, over all ranks) and gradient norm of the last n steps, in float64, so that a
sum over ranks does not depend on its order.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megagpt.distributed.collectives import gather_over_ranks


@dataclass(frozen=True)
class StepMetrics:
    """What some steps in a row came to, on the host, the same on every rank. float64 and bool."""

    last: int  # the last one's number
    rank_losses: Tensor  # (world_size, steps): over all targets of a rank
    shares: Tensor  # (steps,): of targets that have one, summed over ranks
    grad_norms: Tensor  # (steps,); zeros where DeepSpeed has none
    skipped: Tensor  # (steps,)
    scaled: bool  # fp16: a norm that is not finite only lowers the loss scale

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def losses(self) -> Tensor:
        """(steps,): over the targets of all ranks that have one."""
        return mean_loss(self.rank_losses.sum(0), self.shares)

    def means(self) -> dict[str, float]:
        """loss/train over these steps, and the last one's grad_norm; without what is not finite."""
        sound = self.losses.isfinite()
        found = {"grad_norm": self.grad_norms[-1].item()} if self.grad_norms[-1].isfinite() else {}
        if sound.any():
            total = self.rank_losses.sum(0)[sound].sum()
            found = {"loss/train": mean_loss(total, self.shares[sound].sum()).item(), **found}
        return found

    def number(self, i: int) -> int:
        return self.last - len(self) + 1 + i

    def bad(self) -> Tensor:
        """(steps,): whether something was not finite."""
        bad = ~(self.rank_losses.isfinite().all(0) & self.losses.isfinite())
        return bad if self.scaled else bad | ~self.grad_norms.isfinite()


def mean_loss(total: Tensor, share: Tensor) -> Tensor:
    """Over the targets that have a loss; of steps that may be all padding."""
    return total / share.clamp(min=1e-9)


@dataclass
class StepWindow:
    """The numbers of the steps since they were last read, on the device until then."""

    losses: list[Tensor] = field(default_factory=list)  # this rank's, over all its targets
    shares: list[Tensor] = field(default_factory=list)  # of its targets that have one
    grad_norms: list[Tensor | float | None] = field(default_factory=list)
    skipped: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, share: Tensor, grad_norm: Tensor | float | None, skipped: Tensor) -> None:
        self.losses.append(loss)
        self.shares.append(share)
        self.grad_norms.append(grad_norm)
        self.skipped.append(skipped)

    def read(self, last_step: int, *, scaled: bool) -> StepMetrics:
        """Wait for the device, and gather over ranks."""
        n = len(self.losses)
        found = gather_over_ranks(torch.stack([*self.losses, *self.shares])).cpu().double()  # (world_size, 2 n)
        rank_losses, shares = found.split(n, dim=1)
        grad_norms = torch.stack([norm_tensor(norm, self.losses[0].device) for norm in self.grad_norms]).cpu().double()
        return StepMetrics(
            last_step,
            rank_losses,
            shares.sum(0),
            grad_norms,
            torch.stack(self.skipped).cpu() | ~grad_norms.isfinite(),
            scaled,
        )


def norm_tensor(norm: Tensor | float | None, device: torch.device) -> Tensor:
    return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
