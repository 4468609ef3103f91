"""Decide early stopping: stop when the validation loss has not improved for `patience` evaluations. Pure functions."""

from dataclasses import replace

from megagpt.config.regularization import EarlyStoppingConfig
from megagpt.train_state import EarlyStopping


def after_evaluation(state: EarlyStopping, val_loss: float, step: int, cfg: EarlyStoppingConfig) -> EarlyStopping:
    """Return the state after one evaluation. `val_loss` is the mean over all ranks, so that all ranks decide alike."""
    if val_loss < state.best - cfg.min_delta:
        return replace(state, best=val_loss, best_step=step, bad_evals=0)
    if cfg.patience == 0 or step < cfg.min_steps:
        return state
    bad_evals = state.bad_evals + 1
    return replace(state, bad_evals=bad_evals, stopped=bad_evals >= cfg.patience)


def at_resume(state: EarlyStopping, cfg: EarlyStoppingConfig) -> EarlyStopping:
    """Return the state to resume with: a run that was stopped continues if `patience` now allows more evaluations.

    It is then equal to a run that had this patience from its start.
    """
    return replace(state, stopped=state.stopped and 0 < cfg.patience <= state.bad_evals)
