"""Spikes and steps that are not finite: left out of the update, named, or a reason to stop, on every rank alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from megagpt.config.run_file import RunConfig
from megagpt.config.schema import GuardsConfig, SpikesConfig
from megagpt.distributed.collectives import gather_over_ranks
from megagpt.engine.optimizer import adam_on_the_host
from megagpt.errors import UserError
from megagpt.guards.step_window import StepMetrics, mean_loss, norm_tensor
from megagpt.train_state import Health

AS_STANDARD = 1.4826  # of a normal distribution: its standard deviation over its median deviation
LEAST_SPREAD = 0.01  # 1 %: what hardly varies may


class UpdateGate:
    """Stands before the optimizer, which changes nothing where the gate is closed. The device decides: nothing is read.

    It closes if the gradient norm, which is one of all ranks, is not finite, and for spikes if told to. torch's fused
    kernels leave weights, moments and step count alone where `found_inf` is 1, as they do for torch.amp.GradScaler.
    Where DeepSpeed leaves an update out by itself, the gate is not even asked.
    """

    def __init__(self, spikes: SpikesConfig, health: Health, device: torch.device) -> None:
        self._spikes = spikes
        self._history = history_of(health, device)
        self._open = torch.zeros((), dtype=torch.bool, device=device)
        self._losses: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._closed: Tensor | None = None

    def next_step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two lists for the losses and shares of the step's micro-batches, to be full when the optimizer is asked."""
        if (
            self._losses and self._closed is None
        ):  # DeepSpeed left that update out: it counts as step_window.py counts it
            self._history = extended(self._history, self._history.new_full((2,), torch.nan), self._spikes.window)
        self._losses, self._shares, self._closed = [], [], None
        return self._losses, self._shares

    @property
    def closed(self) -> Tensor:
        """bool (): whether it was, in this step."""
        return self._open if self._closed is None else self._closed

    def before_update(self, optimizer: Optimizer, grad_norm: Tensor | float | None) -> None:
        if self._closed is None:  # ZeRO asks for each group of parameters
            norm = norm_tensor(grad_norm, self._open.device)
            self._closed = ~norm.isfinite()
            if self._spikes.action == "skip":
                self._closed = self._closed | self._is_spike(norm)
        optimizer.found_inf = self._closed.float()  # type: ignore[attr-defined]

    def _is_spike(self, norm: Tensor) -> Tensor:
        own = torch.stack([torch.stack(self._losses).mean(), torch.stack(self._shares).mean()])
        loss = mean_loss(*gather_over_ranks(own).double().sum(0).unbind())
        now = torch.stack([loss, norm.double()])
        spike = is_spike(self._history, now, self._spikes)
        self._history = extended(self._history, now, self._spikes.window)
        return spike


def check_skipping(run: RunConfig, device: torch.device) -> None:
    """Raises UserError where a spike could not be left out on the device."""
    if run.megagpt.guards.spikes.action != "skip":
        return
    if run.deepspeed.fp16.enabled or adam_on_the_host(run.deepspeed, device):
        raise UserError(
            "megagpt.guards.spikes.action='skip' is not for fp16, and where the optimizer is offloaded it needs "
            "optimizer.params.torch_adam; set it to 'log', 'stop' or 'roll back'"
        )


@dataclass(frozen=True)
class Verdict:
    health: Health
    roll_back: bool
    lines: tuple[str, ...]  # to be said


def judge(health: Health, steps: StepMetrics, cfg: GuardsConfig, documents: Callable[[int, int], str]) -> Verdict:
    """What some steps mean for the run. `documents` names those that a step had on a rank.

    Raises UserError where the run is to stop, on all ranks alike.
    """
    health, spikes, too_many = after_steps(health, steps, cfg)
    bad, lines = steps.bad().tolist(), []
    for i in (i for i in range(len(steps)) if bad[i]):
        where, what = _not_finite(steps, i)
        if i == too_many:
            raise UserError(
                f"{what}; steps in a row that were not finite: {cfg.max_bad_steps}. Nothing was saved over the last "
                "checkpoint. Lower optimizer.params.lr or gradient_clipping, or raise megagpt.schedule.warmup_steps, "
                f"and start again: the run goes on from that checkpoint. What this step saw: "
                f"{documents(steps.number(i), where)}"
            )
        lines.append(f"{what}; " + ("its update was left out" if steps.skipped[i] else "its update was made"))
    for i in spikes if cfg.spikes.action != "none" else []:
        what = (
            f"a spike at step {steps.number(i)}: loss {float(steps.losses[i]):.4f}, gradient norm "
            f"{float(steps.grad_norms[i]):.4f}, one of them more than {cfg.spikes.sigma:g} deviations above the last "
            f"{cfg.spikes.window} steps"
        )
        if cfg.spikes.action == "stop":
            raise UserError(
                f"{what}; megagpt.guards.spikes.action is to stop, and nothing was saved over the last checkpoint. "
                f"What it saw: {documents(steps.number(i), _worst(steps, i))}"
            )
        lines.append(what + ("; its update was left out" if steps.skipped[i] else ""))
    return Verdict(health, bool(spikes) and cfg.spikes.action == "roll back", tuple(lines))


def _not_finite(steps: StepMetrics, i: int) -> tuple[int, str]:
    """The first rank that saw step i go wrong, and what it saw."""
    ranks = (~steps.rank_losses[:, i].isfinite()).nonzero().flatten().tolist()
    if ranks:
        return ranks[0], f"the loss is {steps.rank_losses[ranks[0], i]} at step {steps.number(i)} on rank {ranks[0]}"
    return _worst(steps, i), f"the gradient norm is {steps.grad_norms[i]} at step {steps.number(i)}"


def _worst(steps: StepMetrics, i: int) -> int:
    """The rank with the highest loss in step i."""
    return int(steps.rank_losses[:, i].argmax())


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


def after_steps(health: Health, steps: StepMetrics, cfg: GuardsConfig) -> tuple[Health, list[int], int | None]:
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
