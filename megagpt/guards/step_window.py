"""Collect the results of the steps since the last log line on the device, then read and reduce them over ranks.

Losses are in nats per token. They are reduced in float64, so that a sum over ranks does not depend on its order.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.distributed.collectives import gather_over_ranks


class StepResult(NamedTuple):
    """The result of one step on this rank: scalar tensors on the device."""

    loss: Tensor  # sum over this rank's targets that have a loss, over the number of all its targets
    share: Tensor  # of its targets that have a loss
    grad_norm: Tensor | float | None  # of all ranks, before clipping; None where DeepSpeed reports none
    skipped: Tensor  # bool: the gate skipped the update
    micro_squares: Tensor  # mean squared gradient norm of this rank's micro-batches; 0 where it is not measured


@dataclass(frozen=True)
class StepMetrics:
    """Losses, gradient norms and skipped updates of consecutive steps: float64 and bool, equal on every rank."""

    last: int  # number of the last step
    rank_losses: Tensor  # (world_size, steps): sum over a rank's targets that have a loss, over the number of all
    shares: Tensor  # (steps,): share of targets that have a loss, summed over ranks
    grad_norms: Tensor  # (steps,): before clipping; 0 where DeepSpeed reports none
    skipped: Tensor  # (steps,): whether the update was skipped
    micro_squares: Tensor  # (steps,): mean squared gradient norm of the micro-batches; 0 where it is not measured
    scaled: bool  # fp16, where a norm that is not finite only lowers the loss scale

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def losses(self) -> Tensor:
        """(steps,): the mean over the targets of all ranks that have a loss."""
        return mean_loss(self.rank_losses.sum(0), self.shares)

    def means(self) -> dict[str, float]:
        """Return train/loss over these steps and the last one's optim/grad_norm, leaving out what is not finite."""
        sound = self.losses.isfinite()
        found = {"optim/grad_norm": self.grad_norms[-1].item()} if self.grad_norms[-1].isfinite() else {}
        if sound.any():
            total = self.rank_losses.sum(0)[sound].sum()
            found = {"train/loss": mean_loss(total, self.shares[sound].sum()).item(), **found}
        return found

    def sums(self) -> list[tuple[float, float]]:
        """Return for each step the loss summed over targets and the share that has one, as means over ranks."""
        return list(zip(self.rank_losses.mean(0).tolist(), (self.shares / len(self.rank_losses)).tolist(), strict=True))

    def number(self, i: int) -> int:
        """Return the step's number in the run."""
        return self.last - len(self) + 1 + i

    def bad(self) -> Tensor:
        """Return (steps,): whether the loss on some rank, or the gradient norm, was not finite."""
        bad = ~(self.rank_losses.isfinite().all(0) & self.losses.isfinite())
        return bad if self.scaled else bad | ~self.grad_norms.isfinite()


def mean_loss(total: Tensor, share: Tensor) -> Tensor:
    """Mean over the targets that have a loss; 0 for a step without any."""
    return total / share.clamp(min=1e-9)


@dataclass
class StepWindow:
    """The results of the steps since the last log line, on the device until they are read."""

    results: list[StepResult] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    def read(self, last_step: int, *, scaled: bool) -> StepMetrics:
        """Wait for the device, and gather over ranks. `scaled`: the run computes in fp16. Collective."""
        losses, shares, norms, skipped, squares = zip(*self.results, strict=True)
        gathered = gather_over_ranks(torch.stack([*losses, *shares, *squares])).cpu().double()  # (world_size, 3 steps)
        rank_losses, rank_shares, rank_squares = gathered.split(len(losses), dim=1)
        grad_norms = torch.stack([norm_tensor(norm, losses[0].device) for norm in norms]).cpu().double()
        return StepMetrics(
            last_step,
            rank_losses,
            rank_shares.sum(0),
            grad_norms,
            torch.stack(skipped).cpu() | ~grad_norms.isfinite(),
            rank_squares.mean(0),
            scaled,
        )


def norm_tensor(norm: Tensor | float | None, device: torch.device) -> Tensor:
    """float32 (): the gradient norm as DeepSpeed reports it, which differs in type from stage to stage."""
    return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
