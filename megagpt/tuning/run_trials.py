"""Run the trials of a study, several at a time, until there are enough or time is up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import Trial, TrialState

from megagpt.errors import UserError
from megagpt.terminal import duration, show
from megagpt.tuning.host_agent import PATIENCE, SILENCE
from megagpt.tuning.space import Check
from megagpt.tuning.study import FAILURE, RESTARTS, Study, overrides
from megagpt.tuning.trial import Place, TrialProcess, holder_after, remove_checkpoints, wait_until_free

POLL_SECONDS = 0.2  # between looks at the trials' curves, which are files
LOOK_SECONDS = 5.0  # between looks at the folder of a trial that waits
KILLED = PATIENCE + 15.0  # seconds after which a trial that was asked to end has been killed, by its agent too
OVER = SILENCE + KILLED  # seconds after which no trial of a tuner that is gone, or of a lost host, trains any longer
MOST_RESTARTS = 3  # of a trial that was interrupted, not by us
HOPELESS = 5  # trials that fail before any trains to its end

_LOST_ALL = "see `megagpt doctor --hostfile HOSTS`; the same command continues the study"


@dataclass
class _Running:
    trial: Trial
    process: TrialProcess
    began: float
    pruned: bool = False


class _Waiting:
    """A trial that is resumed once nothing trains in its folder.

    On a host that was lost it trains on until its agent finds that the tuner is gone.
    """

    def __init__(self, trial: Trial, folder: Path, queued: float) -> None:
        self.trial, self._folder = trial, folder
        self._next_look, self._until = queued, queued + OVER
        self._told = False

    def is_free(self, now: float) -> bool:
        """Look at its folder every few seconds. Raises UserError if it is in use for too long."""
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        if now >= self._until:
            wait_until_free(self._folder, 0.0)
        held = holder_after(self._folder, 0.0)
        if held and not self._told:
            self._told = True
            show(f"trial {self.trial.number} waits: its folder is still in use by {held}")
        return not held


def run_trials(
    study: Study,
    run_file: Path,
    given: Sequence[str],
    *,
    check: Check,
    metric: str,
    places: Sequence[Place],
    n_trials: int,
    stopped: Callable[[], bool],
) -> bool:
    """Run trials until the study has `n_trials`; returns False if it was `stopped` before.

    `given`: the options that were typed after the run file; `check` refuses options that it does not take. A place
    whose host is lost gets no more trials. Raises UserError if the first trials all fail, or all hosts are lost.
    """
    waiting = [_queued(study, trial) for trial in _interrupted(study)]
    free, running = list(places), list[_Running]()

    def start(trial: Trial) -> None:
        place = free.pop(0)
        options = [*given, *overrides(trial)]
        process = TrialProcess(study.folder_of(trial.number), run_file, options, metric, place)
        running.append(_Running(trial, process, time.monotonic()))

    try:
        while not stopped():
            for queued in list(waiting):
                if free and queued.is_free(time.monotonic()):
                    waiting.remove(queued)
                    start(queued.trial)
            while free and len(study.trials) < n_trials:
                trial = study.next()
                if _is_startable(study, trial, check):
                    start(trial)
            if not running and not waiting and len(study.trials) >= n_trials:
                return True
            if not running and not free:
                raise UserError(f"no host is left to train on; {_LOST_ALL}")
            time.sleep(POLL_SECONDS)
            for one in list(running):
                _look_at(study, one)
                if one.process.ended():
                    running.remove(one)
                    if one.process.host_is_lost:
                        show(_lost(one))
                    else:
                        free.append(one.process.place)
                    if _again(study, one):
                        waiting.append(_queued(study, one.trial))
            _refuse_hopeless(study)
    finally:
        for one in running:
            one.process.stop()
        for one in running:
            one.process.wait(KILLED)
    return False


def _interrupted(study: Study) -> list[Trial]:
    """Return the trials that the study was stopped in, once no process trains them."""
    waiting = study.unfinished()
    if waiting:
        numbers = ", ".join(str(trial.number) for trial in waiting)
        show(f"resuming trial {numbers}, which the study was stopped in")
    for trial in waiting:
        wait_until_free(study.folder_of(trial.number), OVER)
    return waiting


def _queued(study: Study, trial: Trial) -> _Waiting:
    return _Waiting(trial, study.folder_of(trial.number), time.monotonic())


def _is_startable(study: Study, trial: Trial, check: Check) -> bool:
    """Tell whether the run file takes a trial's values; record it if not."""
    try:
        check(overrides(trial))
    except UserError as error:
        study.refuse(trial, str(error))
        show(_line(study, trial, 0.0))
        _refuse_hopeless(study)
        return False
    return True


def _look_at(study: Study, one: _Running) -> None:
    """Record what a trial's curve shows, and end it if Hyperband does."""
    one.process.keep_alive()
    if not one.pruned and study.report(one.trial, one.process.curve()):
        one.pruned = True
        one.process.stop()


def _again(study: Study, one: _Running) -> bool:
    """Record how a trial ended, unless it was interrupted and is resumed."""
    restarts = one.trial.user_attrs.get(RESTARTS, 0)
    if one.process.host_is_lost and not one.pruned:
        return True  # which is not the trial's fault, and happens once for each host
    if one.process.was_interrupted and not one.pruned and restarts < MOST_RESTARTS:
        one.trial.set_user_attr(RESTARTS, restarts + 1)
        return True
    best = study.best()
    failure = None if one.pruned else one.process.failure()
    study.finish(one.trial, one.process.curve(), failure, pruned=one.pruned)
    now_best = study.best()
    for trial in (best, one.trial):  # only the best trial's checkpoint stays
        if trial is not None and (now_best is None or trial.number != now_best.number):
            remove_checkpoints(study.folder_of(trial.number))
    show(_line(study, one.trial, time.monotonic() - one.began))
    return False


def _lost(one: _Running) -> str:
    number, host = one.trial.number, one.process.place.host
    return f"host {host} is lost ({one.process.failure()}): trial {number} continues on another, and none starts there"


def _line(study: Study, trial: Trial, seconds: float) -> str:
    """Return a line on a trial that ended."""
    found, best = study.trials[trial.number], study.best()
    values = " ".join(overrides(found))
    if FAILURE in found.user_attrs:
        how = "failed" if found.state == TrialState.FAIL else "not started"
        return f"trial {trial.number}: {how}: {found.user_attrs[FAILURE]} | {values}"
    if found.state == TrialState.PRUNED:
        step = max(found.intermediate_values, default=0)
        how = f"ended at step {step}"
        if step:
            how += f" with {found.intermediate_values[step]:.4f}"
    else:
        how = f"{found.values[0]:.4f}"
    so_far = "" if best is None else f" (best {best.values[0]:.4f} of trial {best.number})"
    return f"trial {trial.number}: {how}{so_far} | {values} | {duration(seconds)}"


def _refuse_hopeless(study: Study) -> None:
    failed = [trial for trial in study.trials if FAILURE in trial.user_attrs]
    others = [trial for trial in study.trials if FAILURE not in trial.user_attrs]
    if len(failed) >= HOPELESS and all(trial.state in (TrialState.FAIL, TrialState.RUNNING) for trial in others):
        first = failed[0]
        log = study.folder_of(first.number).with_suffix(".log")
        raise UserError(
            f"the first {len(failed)} trials failed; the first one ({' '.join(overrides(first))}): "
            f"{first.user_attrs[FAILURE]}{f'; its output is in {log}' if log.exists() else ''}"
        )
