"""The training state that a resumed run needs besides weights, optimizer and RNG state, as plain numbers."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LossGap:
    """The state of the limit on the gap between validation and training loss; at its defaults without a limit."""

    limit: float | None = None  # nats per token, that the counts are of
    last: float | None = None  # at the last evaluation that was finite
    evals: int = 0  # evaluations in a row above the limit
    tokens: int = 0  # trained on up to the last of those
    loss_sum: float = 0.0  # over the training steps since the last evaluation, of losses times shares of targets
    share_sum: float = 0.0


@dataclass(frozen=True)
class EarlyStopping:
    """The state of early stopping, so that a resumed run stops at the step where an uninterrupted one would."""

    best: float = math.inf  # nats per token
    best_step: int = 0
    bad_evals: int = 0  # evaluations in a row that brought no improvement
    stopped: bool = False
    bad_tokens: int = 0  # tokens trained on from the last improvement's evaluation to the last of those
    evaluated_at: int = 0  # tokens seen at the last evaluation
    smoothing: int = 1  # the number of losses whose median the counts are of
    losses: tuple[float, ...] = ()  # the last ones, oldest first, with smoothing alone; infinite: not finite
    lowest: float = math.inf  # of their medians
    gap: LossGap = field(default_factory=LossGap)


@dataclass(frozen=True)
class Health:
    """The recent steps that the guards compare the next one with (guards/step_window.py)."""

    losses: tuple[float, ...] = ()  # of the last guards.spikes.window steps, nats per token, oldest first
    grad_norms: tuple[float, ...] = ()
    bad_in_a_row: int = 0  # how many of the last steps in a row were not finite
    skipped_steps: int = 0  # optimizer updates skipped since the run began
    spikes: int = 0


@dataclass(frozen=True)
class TrainState:
    """The progress of a run after a step."""

    step: int = 0  # optimizer updates done
    samples_seen: int = 0  # over all ranks: the position in the data, with samples that a roll-back left out
    tokens_seen: int = 0  # over all ranks
    val_loss: float | None = None  # of the last evaluation, nats per token
    stopper: EarlyStopping = field(default_factory=EarlyStopping)
    health: Health = field(default_factory=Health)

    def after_step(self, global_batch: int, seq_len: int) -> "TrainState":
        """Return the state after one more step of global_batch samples of seq_len tokens."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + global_batch,
            tokens_seen=self.tokens_seen + global_batch * seq_len,
        )

    def finished(self, max_steps: int) -> bool:
        """Tell whether all steps are done, or early stopping ended the run."""
        return self.step >= max_steps or self.stopper.stopped

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers; an infinite loss, such as `best` before the first evaluation, becomes None in JSON."""
        plain = asdict(self)
        stopper = plain["stopper"]
        stopper |= {name: _or_none(stopper[name]) for name in ("best", "lowest")}
        stopper["losses"] = [_or_none(loss) for loss in stopper["losses"]]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "TrainState":
        """Read what `as_json` returned, perhaps in an older megagpt."""
        # a checkpoint of an older megagpt lacks all but four of these; its tokens are counted from there on
        stopper = {"lowest": None, "losses": (), "evaluated_at": plain["tokens_seen"], "gap": {}} | plain["stopper"]
        stopper |= {name: _or_infinite(stopper[name]) for name in ("best", "lowest")}
        stopper["losses"] = tuple(map(_or_infinite, stopper["losses"]))
        stopper["gap"] = LossGap(**stopper["gap"])
        health = dict(plain.get("health", {}))  # a checkpoint of an older megagpt has none
        for name in ("losses", "grad_norms"):
            health[name] = tuple(health.get(name, ()))
        return cls(**{**plain, "stopper": EarlyStopping(**stopper), "health": Health(**health)})


def _or_none(loss: float) -> float | None:
    return None if math.isinf(loss) else loss


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss
