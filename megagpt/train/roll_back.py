"""Decide a roll-back after a spike: which checkpoint to resume from, and the state to resume in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megagpt.checkpoint.commit import Saved
from megagpt.checkpoint.verification import newest_verified
from megagpt.config.regularization import EarlyStoppingConfig
from megagpt.errors import UserError
from megagpt.train.early_stopping import at_resume
from megagpt.train_state import TrainState

MAX_ROLL_BACKS = 3  # to one checkpoint


def checkpoint_before_spike(out_dir: Path, step: int, earlier: Sequence[int]) -> Saved:
    """Return the newest checkpoint. Collective.

    Raises UserError if there is none, or if it did not help before; `earlier` are the steps that were rolled back to.
    """
    saved = newest_verified(out_dir)
    if saved is not None and earlier.count(saved.state.step) < MAX_ROLL_BACKS:
        return saved
    raise UserError(
        f"spike before step {step}, and "
        + (
            "there is no checkpoint to roll back to"
            if saved is None
            else f"the run was rolled back to step {saved.state.step} {MAX_ROLL_BACKS} times already"
        )
        + "; lower optimizer.params.lr or gradient_clipping, or set megagpt.guards.spikes.action"
    )


def state_after(saved: TrainState, seen: TrainState, cfg: EarlyStoppingConfig) -> TrainState:
    """Return the saved state without the samples that were seen after it, and with the spikes that were counted."""
    health = replace(saved.health, spikes=seen.health.spikes)
    return replace(saved, samples_seen=seen.samples_seen, health=health, stopper=at_resume(saved.stopper, cfg))
