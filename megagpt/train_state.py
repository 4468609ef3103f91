"""Everything besides weights, moments and random generators that a resumed run needs, as plain numbers."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class EarlyStopping:
    """What a resumed run needs to stop at the step where the straight run would."""

    best: float = math.inf  # nats per token
    best_step: int = 0
    bad_evals: int = 0  # evaluations in a row that brought no improvement
    stopped: bool = False


@dataclass(frozen=True)
class Health:
    """What the next step is judged by (guards/step_window.py)."""

    losses: tuple[float, ...] = ()  # of the last guards.spikes.window steps, nats per token, oldest first
    grad_norms: tuple[float, ...] = ()
    bad_in_a_row: int = 0  # the last so many steps were not finite
    skipped_steps: int = 0  # updates left out, since the run began
    spikes: int = 0


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # optimizer updates done
    samples_seen: int = 0  # training examples, over all ranks: the position in the data, rolled past ones included
    tokens_seen: int = 0  # over all ranks
    val_loss: float | None = None  # of the last evaluation, nats per token
    stopper: EarlyStopping = field(default_factory=EarlyStopping)
    health: Health = field(default_factory=Health)

    def after_step(self, global_batch: int, seq_len: int) -> "TrainState":
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + global_batch,
            tokens_seen=self.tokens_seen + global_batch * seq_len,
        )

    def finished(self, max_steps: int) -> bool:
        return self.step >= max_steps or self.stopper.stopped

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; the infinite `best` before the first evaluation, which JSON lacks, becomes None."""
        plain = asdict(self)
        if math.isinf(self.stopper.best):
            plain["stopper"]["best"] = None
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "TrainState":
        stopper = dict(plain["stopper"])
        if stopper["best"] is None:
            stopper["best"] = math.inf
        health = dict(plain.get("health", {}))  # a step of an older megagpt has none
        for name in ("losses", "grad_norms"):
            health[name] = tuple(health.get(name, ()))
        return cls(**{**plain, "stopper": EarlyStopping(**stopper), "health": Health(**health)})
