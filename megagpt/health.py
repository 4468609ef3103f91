"""Whether steps were sound: finite, and not far above the steps before them. Pure, and the same on host and device.

A history is (2, n): loss (nats per token, over all ranks) and gradient norm of the last n steps, in float64, so that a
sum over ranks does not depend on its order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import GuardsConfig, SpikesConfig
from megagpt.state import Health


@dataclass(frozen=True)
class Steps:
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


def history_of(health: Health, device: torch.device | None = None) -> Tensor:
    return torch.tensor([health.losses, health.grad_norms], dtype=torch.float64, device=device)


def is_spike(history: Tensor, now: Tensor, cfg: SpikesConfig) -> Tensor:
    """Whether `now` (2,) lies more than sigma standard deviations above the mean of the history: bool (), no read.

    As OLMo-core's SkipStepOptimizer (6 sigma over 128 steps, once half of them are there), but a fall is no spike.
    """
    if history.size(1) < cfg.window // 2:
        return torch.zeros((), dtype=torch.bool, device=now.device)
    std, mean = torch.std_mean(history, dim=1)
    return (now > mean + cfg.sigma * std).any()


def extended(history: Tensor, now: Tensor, window: int) -> Tensor:
    """The history after one more step; one that is not finite counts as the one before it once more."""
    before = history[:, -1] if history.size(1) else torch.zeros_like(now)
    now = torch.where(now.isfinite().all(), now, before)
    return torch.cat([history, now.unsqueeze(1)], dim=1)[:, -window:]


def after_steps(health: Health, steps: Steps, cfg: GuardsConfig) -> tuple[Health, list[int], int | None]:
    """The health after these steps, which of them were spikes, and where too many in a row were not finite."""
    history, in_a_row, spikes, too_many = history_of(health), health.bad_in_a_row, [], None
    bad = steps.bad().tolist()
    for i, now in enumerate(torch.stack([steps.losses, steps.grad_norms]).unbind(1)):
        in_a_row = in_a_row + 1 if bad[i] else 0
        if in_a_row == cfg.max_bad_steps and too_many is None:
            too_many = i
        if not bad[i] and bool(is_spike(history, now, cfg.spikes)):
            spikes.append(i)
        history = extended(history, now, cfg.spikes.window)
    losses, grad_norms = history.tolist()
    skipped = health.skipped_steps + int(steps.skipped.sum())
    return Health(tuple(losses), tuple(grad_norms), in_a_row, skipped, health.spikes + len(spikes)), spikes, too_many
