"""Whether steps were sound: finite, and not far above the steps before them. Pure, and the same on host and device.

A history is (2, n): loss (nats per token, over all ranks) and gradient norm of the last n steps, in float64, so that a
sum over ranks does not depend on its order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config.schema import GuardsConfig, SpikesConfig
from megagpt.train_state import Health

AS_STANDARD = 1.4826  # of a normal distribution: its standard deviation over its median deviation
LEAST_SPREAD = 0.01  # 1 %: what hardly varies may


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
    """Whether `now` (2,) lies more than sigma deviations above the middle of the history: bool (), no read.

    Of logarithms, because gradient norms differ by factors. Middle and deviation are medians: in a mean and a standard
    deviation one great spike would hide all others for as long as the window has it.
    """
    if history.size(1) < cfg.window // 2:
        return torch.zeros((), dtype=torch.bool, device=now.device)
    logs = history.log()
    middle = logs.median(dim=1, keepdim=True).values
    spread = AS_STANDARD * (logs - middle).abs().median(dim=1).values
    above = now.log() > middle.squeeze(1) + cfg.sigma * spread.clamp(min=LEAST_SPREAD)
    return (above & now.isfinite()).any()  # an infinite norm is another matter, or fp16's loss scale


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
        if in_a_row >= cfg.max_bad_steps and too_many is None:  # it may have been lowered since
            too_many = i
        if not bad[i] and bool(is_spike(history, now, cfg.spikes)):
            spikes.append(i)
        history = extended(history, now, cfg.spikes.window)
    losses, grad_norms = history.tolist()
    skipped = health.skipped_steps + int(steps.skipped.sum())
    return Health(tuple(losses), tuple(grad_norms), in_a_row, skipped, health.spikes + len(spikes)), spikes, too_many
