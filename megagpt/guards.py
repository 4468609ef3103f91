"""What watches a run's numbers, and stops it on every rank alike when they go wrong."""

from dataclasses import dataclass, field

from torch import Tensor, tensor

from megagpt.errors import UserError


@dataclass
class Recent:
    """Of the steps since they were last read this rank's losses, over all its targets, and the share of those that have
    one; and the last gradient norm. On the device until then.
    """

    losses: list[Tensor] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    grad_norm: Tensor | float | None = None

    def add(self, loss: Tensor, share: Tensor, grad_norm: Tensor | float | None) -> None:
        self.losses.append(loss)
        self.shares.append(share)
        self.grad_norm = grad_norm


def check_finite(losses: Tensor, grad_norm: float | None, last_step: int) -> None:
    """losses (world_size, steps up to last_step). Names the first step that went wrong and the rank that saw it."""
    bad = (~losses.isfinite()).nonzero()  # rows (rank, step)
    if len(bad):
        at = int(bad[:, 1].min())
        where = int(bad[bad[:, 1] == at][0, 0])
        what = f"the loss is {losses[where, at]} at step {last_step - losses.size(1) + 1 + at} on rank {where}"
    elif grad_norm is not None and not tensor(grad_norm).isfinite():
        what = f"the gradient norm is {grad_norm} at step {last_step}"
    else:
        return
    raise UserError(
        f"{what}; nothing was saved over the last checkpoint. Lower optimizer.params.lr or gradient_clipping, or "
        "raise megagpt.schedule.warmup_steps, and start again: the run goes on from that checkpoint"
    )
