"""Detect loss spikes and steps that are not finite: report them, skip their update, roll back or stop the run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from megagpt.config.guards import GuardsConfig, SpikesConfig
from megagpt.config.run_file import RunConfig
from megagpt.distributed.collectives import gather_over_ranks
from megagpt.errors import UserError
from megagpt.guards.step_window import StepMetrics, mean_loss, norm_tensor
from megagpt.train_state import Health

# The standard deviation of a normal distribution is 1.4826 times its median absolute deviation.
MAD_TO_STANDARD = 1.4826
# The least deviations of the logarithms, so 1 % and 20 %. The gradient norm of a small batch has a heavy tail: in
# healthy runs it doubles now and then, far outside its usual deviation. At 6 deviations it has to more than triple.
MIN_DEVIATION_LOSS, MIN_DEVIATION_NORM = 0.01, 0.2


class UpdateGate:
    """Skips an optimizer update without a host sync: sets `found_inf` on the device where the update must not be made.

    That is where the gradient norm, which is the same on all ranks, is not finite, and at a spike if the action is
    "skip". torch's fused Adam leaves weights, moments and step count alone where `found_inf` is 1, as it does for
    torch.amp.GradScaler. Where DeepSpeed skips an update by itself, the gate is not asked.
    """

    def __init__(self, spikes: SpikesConfig, health: Health, device: torch.device) -> None:
        self._spikes = spikes
        self._history = history_of(health, device)
        self._open = torch.zeros((), dtype=torch.bool, device=device)
        self._closed: Tensor | None = None
        self._observed: Tensor | None = None

    def observe(self, loss: Tensor, share: Tensor) -> None:
        """Take the step's loss on this rank and the share of its targets that have one, before the last engine.step().

        Both are means over the step's micro-batches and stay on the device.
        """
        if self._observed is not None and self._closed is None:
            # DeepSpeed skipped the update before this one: it counts as `after_steps` counts a step that is not finite
            self._history = extended(self._history, self._history.new_full((2,), torch.nan), self._spikes.window)
        self._observed, self._closed = torch.stack([loss, share]), None

    @property
    def closed(self) -> Tensor:
        """Tell whether the gate skipped this step's update, bool ()."""
        return self._open if self._closed is None else self._closed

    def before_update(self, optimizer: Optimizer, grad_norm: Tensor | float | None) -> None:
        """Decide, once per step, and tell the optimizer. `grad_norm` is that of all ranks, before clipping."""
        if self._closed is None:  # ZeRO asks for each group of parameters
            norm = norm_tensor(grad_norm, self._open.device)
            self._closed = ~norm.isfinite()
            if self._spikes.action == "skip":
                self._closed = self._closed | self._is_spike(norm)
        optimizer.found_inf = self._closed.float()  # type: ignore[attr-defined]

    def _is_spike(self, norm: Tensor) -> Tensor:
        assert self._observed is not None
        loss = mean_loss(*gather_over_ranks(self._observed).double().sum(0).unbind())
        now = torch.stack([loss, norm.double()])
        spike = is_spike(self._history, now, self._spikes).any()
        self._history = extended(self._history, now, self._spikes.window)
        return spike


def check_skipping(run: RunConfig, device: torch.device) -> None:
    """Raise UserError where the update of a spike cannot be skipped on the device."""
    if run.megagpt.guards.spikes.action != "skip":
        return
    if run.deepspeed.fp16.enabled or run.deepspeed.uses_cpu_adam(device.type):
        raise UserError(
            "megagpt.guards.spikes.action='skip' does not work with fp16, and with an offloaded optimizer it needs "
            "optimizer.params.torch_adam; set megagpt.guards.spikes.action to 'log', 'stop' or 'roll back'"
        )


@dataclass(frozen=True)
class Verdict:
    """The decision of the guards about the steps since the last log line."""

    health: Health
    roll_back: bool
    lines: tuple[str, ...]  # to print


def judge_steps(
    health: Health,
    steps: StepMetrics,
    cfg: GuardsConfig,
    *,
    documents: Callable[[int, int], str],
    what_to_change: Callable[[int], str],
) -> Verdict:
    """Judge some steps. `documents(step, rank)` names the documents that a step read on a rank.

    `what_to_change(step)` is the advice when no step after that one was finite. Raises UserError, on every rank, where
    the run must stop.
    """
    health, spikes, too_many = after_steps(health, steps, cfg)
    bad, lines = steps.bad().tolist(), []
    for i in (i for i in range(len(steps)) if bad[i]):
        where, what = _not_finite(steps, i)
        if i == too_many:
            raise UserError(
                f"{what}: {cfg.max_bad_steps} steps in a row were not finite (megagpt.guards.max_bad_steps). "
                f"{what_to_change(steps.number(i) - cfg.max_bad_steps)}. Documents of this step: "
                f"{documents(steps.number(i), where)}"
            )
        lines.append(f"{what}; its update was " + ("skipped" if steps.skipped[i] else "made"))
    for i, spiked in spikes.items() if cfg.spikes.action != "none" else ():
        what = f"spike at step {steps.number(i)}: {' and '.join(spiked)}"
        if cfg.spikes.action == "stop":
            raise UserError(
                f"{what}; the run stops, because megagpt.guards.spikes.action is 'stop'. The last checkpoint is "
                f"untouched. Documents of this step: {documents(steps.number(i), _worst(steps, i))}"
            )
        if cfg.spikes.action == "log" and not steps.skipped[i]:
            what += "; one alone is harmless. Where they are many, lower optimizer.params.lr or gradient_clipping"
        lines.append(what + ("; its update was skipped" if steps.skipped[i] else ""))
    return Verdict(health, bool(spikes) and cfg.spikes.action == "roll back", tuple(lines))


def _not_finite(steps: StepMetrics, i: int) -> tuple[int, str]:
    """Return the first rank on which step i was not finite, and what was not."""
    ranks = (~steps.rank_losses[:, i].isfinite()).nonzero().flatten().tolist()
    if ranks:
        return ranks[0], f"the loss is {steps.rank_losses[ranks[0], i]} at step {steps.number(i)} on rank {ranks[0]}"
    return _worst(steps, i), f"the gradient norm is {steps.grad_norms[i]} at step {steps.number(i)}"


def _worst(steps: StepMetrics, i: int) -> int:
    """Return the rank with the highest loss in step i."""
    return int(steps.rank_losses[:, i].argmax())


def history_of(health: Health, device: torch.device | None = None) -> Tensor:
    """Return (2, steps): losses and gradient norms of the last steps, float64."""
    return torch.tensor([health.losses, health.grad_norms], dtype=torch.float64, device=device)


def limits(history: Tensor, cfg: SpikesConfig) -> Tensor:
    """Return (2,): the limits of loss and gradient norm for spikes; infinite until the window is half full.

    The limit is `sigma` standard deviations above the middle of the history, both of logarithms, because gradient norms
    differ by factors, and both by medians: one great spike in a mean and a standard deviation would hide all others for
    as long as the window holds it.
    """
    if history.size(1) < cfg.window // 2:
        return history.new_full((2,), torch.inf)
    logs = history.log()
    middle = logs.median(dim=1, keepdim=True).values
    deviation = MAD_TO_STANDARD * (logs - middle).abs().median(dim=1).values
    loss, norm = deviation.unbind()
    deviation = torch.stack([loss.clamp(min=MIN_DEVIATION_LOSS), norm.clamp(min=MIN_DEVIATION_NORM)])
    return (middle.squeeze(1) + cfg.sigma * deviation).exp()


def is_spike(history: Tensor, now: Tensor, cfg: SpikesConfig) -> Tensor:
    """Tell whether loss and gradient norm of a step, `now` (2,), are spikes: bool (2,). Reads nothing from the device.

    A value that is not finite is no spike: an infinite norm skips the update, or lowers the loss scale of fp16.
    """
    return (now > limits(history, cfg)) & now.isfinite()


def extended(history: Tensor, now: Tensor, window: int) -> Tensor:
    """Return the history after one more step. A step that is not finite repeats the one before it."""
    before = history[:, -1] if history.size(1) else torch.zeros_like(now)
    now = torch.where(now.isfinite().all(), now, before)
    return torch.cat([history, now.unsqueeze(1)], dim=1)[:, -window:]


def after_steps(
    health: Health, steps: StepMetrics, cfg: GuardsConfig
) -> tuple[Health, dict[int, list[str]], int | None]:
    """Return the health after these steps, {index: what spiked}, and the first index of too many bad steps in a row."""
    history, in_a_row, spikes, too_many = history_of(health), health.bad_in_a_row, dict[int, list[str]](), None
    bad = steps.bad().tolist()
    for i, now in enumerate(torch.stack([steps.losses, steps.grad_norms]).unbind(1)):
        in_a_row = in_a_row + 1 if bad[i] else 0
        if in_a_row >= cfg.max_bad_steps and too_many is None:  # max_bad_steps may have been lowered since
            too_many = i
        if not bad[i] and (spiked := _spiked(history, now, cfg.spikes)):
            spikes[i] = spiked
        history = extended(history, now, cfg.spikes.window)
    losses, grad_norms = history.tolist()
    skipped = health.skipped_steps + int(steps.skipped.sum())
    return Health(tuple(losses), tuple(grad_norms), in_a_row, skipped, health.spikes + len(spikes)), spikes, too_many


def _spiked(history: Tensor, now: Tensor, cfg: SpikesConfig) -> list[str]:
    """Describe which of loss and gradient norm spiked, with its limit."""
    columns = ("loss", "gradient norm"), now.tolist(), limits(history, cfg).tolist(), is_spike(history, now, cfg)
    return [
        f"{name} {value:.4f} (limit {limit:.4f})" for name, value, limit, spike in zip(*columns, strict=True) if spike
    ]
