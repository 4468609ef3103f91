"""Decide when a run stops early, from validation losses, their medians and their distance from the training loss.

Pure functions. The best step is that of the lowest loss, whatever decides when to stop.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

from megagpt.config.regularization import EarlyStoppingConfig
from megagpt.terminal import counted
from megagpt.train_state import EarlyStopping, LossGap

KEY = "megagpt.early_stopping"


def after_evaluation(
    state: EarlyStopping, val_loss: float, step: int, tokens_seen: int, cfg: EarlyStoppingConfig
) -> EarlyStopping:
    """Return the state after one evaluation. `val_loss` is the mean over all ranks, so that all ranks decide alike."""
    state = _by_the_rule(state, cfg)
    tokens, in_time = tokens_seen - state.evaluated_at, step >= cfg.min_steps
    improved = val_loss < state.best - cfg.min_delta
    if improved:
        state = replace(state, best=val_loss, best_step=step)
    if cfg.smoothing > 1:
        state, improved = _with_median(state, val_loss, cfg)
    if improved:
        state = replace(state, bad_evals=0, bad_tokens=0)
    elif in_time and _has_patience(cfg) and _decides(state):
        state = replace(state, bad_evals=state.bad_evals + 1, bad_tokens=state.bad_tokens + tokens)
    state = replace(state, gap=_gap_after(state.gap, val_loss, tokens if in_time else None), evaluated_at=tokens_seen)
    return replace(state, stopped=_no_patience_left(state, cfg) or _gap_lasted(state, cfg))


def after_training(
    state: EarlyStopping, losses: Iterable[tuple[float, float]], cfg: EarlyStoppingConfig
) -> EarlyStopping:
    """Return the state after some training steps: their losses over all targets, and the shares that have one.

    They are added one by one, so that a run that is resumed between two of them has the same sum.
    """
    if cfg.max_gap is None:
        return state
    state = _by_the_rule(state, cfg)
    loss_sum, share_sum = state.gap.loss_sum, state.gap.share_sum
    for loss, share in losses:
        if math.isfinite(loss):
            loss_sum, share_sum = loss_sum + loss, share_sum + share
    return replace(state, gap=replace(state.gap, loss_sum=loss_sum, share_sum=share_sum))


def at_resume(state: EarlyStopping, cfg: EarlyStoppingConfig) -> EarlyStopping:
    """Return the state to resume with: a run that was stopped continues if `cfg` now allows more.

    With more patience it is then equal to a run that had this patience from its start.
    """
    state = _by_the_rule(state, cfg)
    return replace(state, stopped=state.stopped and (_no_patience_left(state, cfg) or _gap_lasted(state, cfg)))


def restarted(state: EarlyStopping, cfg: EarlyStoppingConfig) -> list[str]:
    """Return a line for each count of a checkpoint that begins again, because the rule is another."""
    lines = []
    if state.smoothing != cfg.smoothing:
        what = "evaluations without an improvement"
        lines.append(f"{KEY}.smoothing was {state.smoothing} and is {cfg.smoothing}: {what}")
    if state.gap.limit != cfg.max_gap and cfg.max_gap is not None:
        before = "null" if state.gap.limit is None else f"{state.gap.limit:g}"
        lines.append(f"{KEY}.max_gap was {before} and is {cfg.max_gap:g}: evaluations above it")
    return [f"note: {line} are counted from this step on" for line in lines]


def metrics_of(state: EarlyStopping, val_loss: float) -> dict[str, float]:
    """Return what is logged besides the losses; a loss that is not finite has no gap, and the state an older one."""
    metrics = {}
    if state.losses and _decides(state):
        metrics["val/median_loss"] = median(state.losses)
    if state.gap.last is not None and math.isfinite(val_loss):
        metrics["val/train_gap"] = state.gap.last
    return metrics


def why_stopped(state: EarlyStopping, cfg: EarlyStoppingConfig) -> str:
    """Return the reason for a stop, with its numbers."""
    reasons = []
    if _no_patience_left(state, cfg):
        lower = f"lower by {KEY}.min_delta={cfg.min_delta:g} than" if cfg.min_delta else "lower than"
        what = f"{cfg.monitor} was not {lower} the {state.best:.4f} of step {state.best_step}"
        if cfg.smoothing > 1:
            what = f"the median of {cfg.smoothing} {cfg.monitor} was not {lower} the lowest one, {state.lowest:.4f}"
        reasons.append(f"for {_lasting(state.bad_evals, state.bad_tokens, cfg)} {what}")
    if _gap_lasted(state, cfg) and state.gap.last is not None:
        reasons.append(
            f"for {_lasting(state.gap.evals, state.gap.tokens, cfg)} {cfg.monitor} was more than "
            f"{KEY}.max_gap={cfg.max_gap:g} above train/loss, at last by {state.gap.last:.4f}"
        )
    return ", and ".join(reasons)


def way_on(state: EarlyStopping, cfg: EarlyStoppingConfig) -> str:
    """Return what to set for a run that stopped early to train further."""
    ways = []
    if _no_patience_left(state, cfg):
        key, used, off = ("patience", state.bad_evals, "0")
        if cfg.patience_tokens is not None:
            key, used, off = ("patience_tokens", state.bad_tokens, "null")
        # without patience, one evaluation above max_gap ends the run
        switch_off = f", or to {off} for no early stopping" if cfg.max_gap is None else ""
        ways.append(f"{KEY}.{key} to more than {used}{switch_off}")
    if _gap_lasted(state, cfg) and state.gap.last is not None:
        ways.append(f"{KEY}.max_gap to more than {state.gap.last:.4f}, or to null for no limit")
    return f"set {', and '.join(ways)}, to train further"


def _by_the_rule(state: EarlyStopping, cfg: EarlyStoppingConfig) -> EarlyStopping:
    """Return the state with the counts of another rule at their beginnings."""
    if state.smoothing != cfg.smoothing:
        state = replace(state, smoothing=cfg.smoothing, losses=(), lowest=math.inf, bad_evals=0, bad_tokens=0)
    return state if state.gap.limit == cfg.max_gap else replace(state, gap=LossGap(limit=cfg.max_gap))


def _with_median(state: EarlyStopping, val_loss: float, cfg: EarlyStoppingConfig) -> tuple[EarlyStopping, bool]:
    """Return the state with one more loss, and whether the median is an improvement."""
    # one that is not finite is higher than all others, and outvoted as any other outlier
    losses = (*state.losses, val_loss if math.isfinite(val_loss) else math.inf)[-cfg.smoothing :]
    state = replace(state, losses=losses)
    if not _decides(state) or not median(losses) < state.lowest - cfg.min_delta:
        return state, False
    return replace(state, lowest=median(losses)), True


def _decides(state: EarlyStopping) -> bool:
    """Tell whether there are as many evaluations as a median needs."""
    return state.smoothing == 1 or len(state.losses) == state.smoothing


def _gap_after(gap: LossGap, val_loss: float, tokens: int | None) -> LossGap:
    """Return the gap after an evaluation, and `tokens` of training; None before the steps that count."""
    last = val_loss - gap.loss_sum / gap.share_sum if gap.share_sum else math.nan
    gap = replace(gap, loss_sum=0.0, share_sum=0.0)
    if gap.limit is None or not math.isfinite(last):
        return gap
    if last <= gap.limit:
        return LossGap(gap.limit, last)
    counted_on = {} if tokens is None else {"evals": gap.evals + 1, "tokens": gap.tokens + tokens}
    return replace(gap, last=last, **counted_on)


def _has_patience(cfg: EarlyStoppingConfig) -> bool:
    return cfg.patience > 0 or cfg.patience_tokens is not None


def _no_patience_left(state: EarlyStopping, cfg: EarlyStoppingConfig) -> bool:
    return _lasted(state.bad_evals, state.bad_tokens, cfg)


def _gap_lasted(state: EarlyStopping, cfg: EarlyStoppingConfig) -> bool:
    return _lasted(state.gap.evals, state.gap.tokens, cfg) or (not _has_patience(cfg) and state.gap.evals > 0)


def _lasted(evals: int, tokens: int, cfg: EarlyStoppingConfig) -> bool:
    """Tell whether this many evaluations in a row, or tokens, are all that patience allows."""
    if cfg.patience_tokens is not None:
        return tokens >= cfg.patience_tokens
    return 0 < cfg.patience <= evals


def _lasting(evals: int, tokens: int, cfg: EarlyStoppingConfig) -> str:
    return counted(evals, "evaluation") if cfg.patience_tokens is None else f"{tokens:,} tokens"
