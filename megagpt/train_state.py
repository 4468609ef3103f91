"""The training state that a resumed run needs besides weights, optimizer and RNG state, as plain numbers."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class EarlyStopping:
    """The state of early stopping, so that a resumed run stops at the step where an uninterrupted one would."""

    best: float = math.inf  # nats per token
    best_step: int = 0
    bad_evals: int = 0  # evaluations in a row that brought no improvement
    stopped: bool = False


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
        """Return plain numbers; `best` is infinite before the first evaluation, which JSON lacks, and becomes None."""
        plain = asdict(self)
        if math.isinf(self.stopper.best):
            plain["stopper"]["best"] = None
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "TrainState":
        """Read what `as_json` returned, perhaps in an older megagpt."""
        stopper = dict(plain["stopper"])
        if stopper["best"] is None:
            stopper["best"] = math.inf
        health = dict(plain.get("health", {}))  # a checkpoint of an older megagpt has none
        for name in ("losses", "grad_norms"):
            health[name] = tuple(health.get(name, ()))
        return cls(**{**plain, "stopper": EarlyStopping(**stopper), "health": Health(**health)})
