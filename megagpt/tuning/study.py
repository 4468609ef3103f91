"""A study in a folder: which trials there were, which comes next, and what they found.

    STUDY/study.json     the run file, the space and the seed, which a study keeps
    STUDY/journal.log    Optuna's record of all trials (Akiba et al. 2019)
    STUDY/trials/0007/   the run folder of a trial; STUDY/trials/0007.log what it printed
    STUDY/best.json      the run file of the best trial
    STUDY/report.html

The record is a journal: one file that is only appended to, under a lock that also holds on NFS, where SQLite's does
not. Trials are drawn by TPE (Bergstra et al. 2011) and ended early by Hyperband (Li et al. 2018) on their validation
losses.
"""

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from megagpt import __version__
from megagpt.atomic_files import write_atomically
from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig
from megagpt.errors import UserError
from megagpt.file_lock import LOCK, FileLock, LockHeldError
from megagpt.terminal import show, typed
from megagpt.tuning.space import Space, overrides_of

STUDY, JOURNAL, TRIALS = "study.json", "journal.log", "trials"
OVERRIDES, FAILURE, RESTARTS = "overrides", "failure", "restarts"  # attributes of a trial


class Study:
    """A study that this process alone continues."""

    def __init__(self, folder: Path, run: RunConfig, space: Space, seed: int) -> None:
        """Open or begin it. Raises UserError for a study of something else, and for one that another process has."""
        self.folder, self.space, self.seed = folder, space, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.take()
        except LockHeldError as error:
            raise UserError(f"study {folder} is in use by {error}; wait, or give another --study") from None
        self._check(run)
        self._cut_torn_line()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", ExperimentalWarning)
        journal = str(folder / JOURNAL)
        storage = JournalStorage(JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal)))
        steps, every = run.megagpt.schedule.max_steps, run.megagpt.every.eval
        try:
            self.optuna = optuna.create_study(
                storage=storage,
                study_name="megagpt",
                load_if_exists=True,
                pruner=optuna.pruners.HyperbandPruner(min_resource=min(every, steps), max_resource=steps),
            )
        except (ValueError, KeyError) as error:
            raise UserError(f"{journal} is damaged ({error}); give another --study") from None

    def _cut_torn_line(self) -> None:
        """Remove the start of a line that a full disk or a power failure left: all after it would be unreadable."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            if (self.folder / TRIALS).exists():  # new trials of the same numbers would resume from these
                raise UserError(f"{self.folder} has {TRIALS} without its {JOURNAL}; give another --study")
            return
        written = journal.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            show(f"{journal}: its last line was not written to its end, and is left out")
            os.truncate(journal, whole)

    def close(self) -> None:
        """Let other processes have it."""
        self._lock.release()

    def _check(self, run: RunConfig) -> None:
        """Write down what the study is about, or compare."""
        about = {
            "version": __version__,
            "seed": self.seed,
            "space": self.space.as_json(),
            "run file": {**run.as_json(), "megagpt": {**run.as_json()["megagpt"], "out_dir": ""}},
        }
        about = json.loads(json.dumps(about))
        file = self.folder / STUDY
        if not file.exists():
            if (self.folder / JOURNAL).exists():
                raise UserError(f"{self.folder} has a {JOURNAL} without its {STUDY}; give another --study")
            write_atomically(file, json.dumps(about, indent=1).encode())
            return
        try:
            before = json.loads(file.read_bytes())
            parts = {name: (_flat(before[name]), _flat(about[name])) for name in about}
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}); give another --study") from None
        for name, (was, now) in parts.items():
            for key in sorted(was.keys() | now.keys()):
                if was.get(key) != now.get(key):
                    what = f"{key} of the {name}" if key else name
                    raise UserError(
                        f"study {self.folder} was begun with {what} {json.dumps(was.get(key))}, and now it is "
                        f"{json.dumps(now.get(key))}; its losses could not be compared: give another --study DIR, or "
                        f"remove this one (rm -r {typed(self.folder)})"
                    )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials that were begun."""
        return self.optuna.get_trials(deepcopy=False)

    def folder_of(self, number: int) -> Path:
        """Return a trial's run folder."""
        return self.folder / TRIALS / f"{number:04d}"

    def unfinished(self) -> list[Trial]:
        """Return the trials that a killed tuner left. One that was not drawn to its end is given up."""
        found = []
        for trial in self.trials:
            if trial.state == TrialState.RUNNING:
                if OVERRIDES in trial.user_attrs:
                    found.append(Trial(self.optuna, trial._trial_id))
                else:
                    self.optuna.tell(trial.number, state=TrialState.FAIL)
        return found

    def next(self) -> Trial:
        """Draw a trial. The same history gives the same one, also in another process."""
        # A trial's number seeds its draw: a sampler's own state would be lost with the process.
        self.optuna.sampler = TPESampler(seed=self.seed * 100_003 + len(self.trials), multivariate=True, group=True)
        trial = self.optuna.ask()
        trial.set_user_attr(OVERRIDES, overrides_of(self.space.draw(trial)))
        (self.folder / TRIALS).mkdir(exist_ok=True)
        return trial

    def report(self, trial: Trial, curve: dict[int, float]) -> bool:
        """Record the new points of a trial's curve; returns whether Hyperband ends it."""
        known = self.trials[trial.number].intermediate_values
        for step in sorted(curve.keys() - known.keys()):
            if math.isnan(curve[step]):
                return True
            trial.report(curve[step], step)
            if trial.should_prune():
                return True
        return False

    def finish(self, trial: Trial, curve: dict[int, float], failure: str | None, *, pruned: bool) -> None:
        """Record how a trial ended: by its lowest loss, pruned, or failed."""
        finite = [loss for loss in curve.values() if math.isfinite(loss)]
        if failure is None and not finite:
            failure = "no validation loss was finite"
        if failure is not None:
            trial.set_user_attr(FAILURE, failure)
            self.optuna.tell(trial, state=TrialState.FAIL)
        elif pruned:
            self.optuna.tell(trial, state=TrialState.PRUNED)
        else:
            self.optuna.tell(trial, min(finite))

    def refuse(self, trial: Trial, reason: str) -> None:
        """Record a trial that is not started. TPE counts it among the worst, and so draws fewer like it."""
        trial.set_user_attr(FAILURE, reason)
        self.optuna.tell(trial, state=TrialState.PRUNED)

    def best(self) -> FrozenTrial | None:
        """Return the trial with the lowest loss of those that trained to their end."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return min(done, key=lambda trial: trial.values[0]) if done else None


def overrides(trial: FrozenTrial | Trial) -> list[str]:
    """Return a trial's values as they are typed after a run file."""
    found: Sequence[str] = trial.user_attrs[OVERRIDES]
    return list(found)


def _flat(part: Any) -> dict[str, Any]:
    return leaves(part) if isinstance(part, dict) else {"": part}
