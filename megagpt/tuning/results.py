"""Write the results of a study: the run file of its best trial, and an HTML page."""

import json
import math
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from megagpt.atomic_files import write_atomically
from megagpt.config.extends import merged, read_run_files
from megagpt.config.parsing import overridden
from megagpt.html_parts import Cell, facts, figure, note, page, section, side_by_side, table
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.svg_plots import COLORS, svg
from megagpt.tuning.study import FAILURE, RESTARTS, Study, overrides

BEST, REPORT = "best.json", "report.html"
GENERATOR = "megagpt tune"
FEWEST = 4  # trials that importance can be told from
GRAY, WIDTH, HEIGHT = COLORS[-1], 6.5, 3.6
STATES = {TrialState.COMPLETE: "trained", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}
NOT_STARTED = "not started"  # its values were no run file


def _how(trial: FrozenTrial) -> str:
    is_refused = trial.state == TrialState.PRUNED and FAILURE in trial.user_attrs
    return NOT_STARTED if is_refused else STATES[trial.state]


def write_best(study: Study, run_file: Path, given: Sequence[str]) -> Path | None:
    """Write the run file of the best trial, which trains as it is; None if no trial trained to its end."""
    best = study.best()
    if best is None:
        return None
    raw = overridden(merged(read_run_files(run_file)), [*given, *overrides(best)])
    raw.pop("$schema", None)
    raw["megagpt"]["out_dir"] = f"{raw['megagpt']['out_dir']}_tuned"
    path = study.folder / BEST
    write_atomically(path, (json.dumps(raw, indent=2) + "\n").encode())
    return path


def write_page(study: Study, metric: str) -> Path:
    """Write the page."""
    path = study.folder / REPORT
    write_atomically(path, page_of(study, metric, datetime.now()).encode())
    return path


def page_of(study: Study, metric: str, made: datetime) -> str:
    """Return a study as an HTML page."""
    trials = [trial for trial in study.trials if trial.state in STATES]
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return page(
        study.folder.resolve().name,
        [
            _overview(study, trials, metric, made),
            section("Curves", figure(f"{metric} by step", _curves(study, trials))),
            _choices(study, done, metric),
            section("Trials", table(*_rows(study, trials, metric))),
        ],
        generator=GENERATOR,
    )


def _overview(study: Study, trials: Sequence[FrozenTrial], metric: str, made: datetime) -> str:
    best = study.best()
    counted = {name: str(sum(_how(trial) == name for trial in trials)) for name in (*STATES.values(), NOT_STARTED)}
    found = {} if best is None else {f"lowest {metric}": f"{best.values[0]:.4f}", "best trial": str(best.number)}
    values = "no trial trained to its end" if best is None else " ".join(overrides(best))
    return section("Study", facts({**found, **counted}), note(values), note(f"written {made:%Y-%m-%d %H:%M}"))


def _curves(study: Study, trials: Sequence[FrozenTrial]) -> str:
    best = study.best()

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        shown: list[float] = []
        for trial in sorted(trials, key=lambda trial: best is not None and trial.number == best.number):
            points = sorted((step, loss) for step, loss in trial.intermediate_values.items() if math.isfinite(loss))
            if not points:
                continue
            is_best = best is not None and trial.number == best.number
            steps, losses = zip(*points, strict=True)
            shown += losses
            style: dict[str, Any] = {"color": COLORS[0], "linewidth": 2.0} if is_best else {"color": GRAY, "alpha": 0.5}
            ended = "x" if trial.state == TrialState.PRUNED else "o"
            axes.plot(steps, losses, markevery=[-1], marker=ended, markersize=3, **style)
        if shown:
            lowest = min(shown)
            axes.set_ylim(lowest - 0.02 * abs(lowest), min(max(shown), 2 * sorted(shown)[len(shown) // 2] - lowest))
        axes.set_xlabel("step")
        drawn.set_layout_engine("constrained")

    return svg("curves", 2 * WIDTH, HEIGHT, draw)


def _choices(study: Study, done: Sequence[FrozenTrial], metric: str) -> str:
    """Show which keys mattered, and the values of all trials."""
    if len(done) < FEWEST:
        return section("Keys", note(f"{FEWEST} trials that trained to their end are needed to tell what mattered"))
    plots = [figure(f"values and {metric}, the best third in blue", _parallel(study, done))]
    if importances := _importances(study):
        plots.insert(0, figure("importance (PED-ANOVA, Watanabe et al. 2023)", _bars(importances)))
    return section("Keys", side_by_side(*plots))


def _importances(study: Study) -> dict[str, float]:
    try:
        # Optuna warns of equal losses, whose importances are equal.
        with warnings.catch_warnings(action="ignore"):
            return dict(get_param_importances(study.optuna, evaluator=PedAnovaImportanceEvaluator()))
    except (ValueError, RuntimeError):  # too few trials, or keys that no two trials share
        return {}


def _bars(importances: dict[str, float]) -> str:
    names = list(importances)[::-1]

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        axes.barh(names, [importances[name] for name in names], color=COLORS[0])
        axes.set_xlabel("share of importance")
        drawn.set_layout_engine("constrained")

    return svg("importance", WIDTH, max(1.5, 0.4 * len(names) + 0.8), draw)


def _parallel(study: Study, done: Sequence[FrozenTrial]) -> str:
    """Draw a line for each trial over an axis for each key and one for the loss."""
    keys = [key for key in study.space.dimensions if any(key in trial.params for trial in done)]
    losses = sorted(trial.values[0] for trial in done)
    good = losses[(len(losses) - 1) // 3]

    def height(key: str, trial: FrozenTrial) -> float:
        dimension, value = study.space.dimensions[key], trial.params.get(key)
        if value is None:
            return math.nan
        if dimension.choices is not None:
            names = [json.dumps(choice) for choice in dimension.choices]
            return names.index(value) / max(1, len(names) - 1)
        assert dimension.low is not None
        assert dimension.high is not None
        low, high, at = (math.log(x) if dimension.log else x for x in (dimension.low, dimension.high, value))
        return float((at - low) / (high - low))

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        places = range(len(keys) + 1)
        for trial in sorted(done, key=lambda trial: -trial.values[0]):
            of_loss = (trial.values[0] - losses[0]) / ((losses[-1] - losses[0]) or 1.0)
            is_good = trial.values[0] <= good
            axes.plot(
                places,
                [*(height(key, trial) for key in keys), of_loss],
                color=COLORS[0] if is_good else GRAY,
                alpha=0.9 if is_good else 0.4,
                marker=".",
            )
        for at, key in enumerate(keys):
            low, *_, high = [json.dumps(value) for value in study.space.dimensions[key].extremes] * 2
            axes.annotate(low, (at, 0), xytext=(3, -3), textcoords="offset points", va="top", fontsize=7)
            axes.annotate(high, (at, 1), xytext=(3, 3), textcoords="offset points", va="bottom", fontsize=7)
        for loss, y, va in ((losses[0], 0, "top"), (losses[-1], 1, "bottom")):
            axes.annotate(f"{loss:.4f}", (len(keys), y), xytext=(3, 0), textcoords="offset points", va=va, fontsize=7)
        axes.set_xticks(list(places), [*(key.rpartition(".")[2] for key in keys), "loss"], rotation=20, ha="right")
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.set_xlim(-0.2, len(keys) + 0.6)
        drawn.set_layout_engine("constrained")

    return svg("parallel", WIDTH, HEIGHT, draw)


def _rows(study: Study, trials: Sequence[FrozenTrial], metric: str) -> tuple[list[str], list[list[Cell]]]:
    """Return the heads and the rows of the table of trials, the best first."""
    keys = list(study.space.dimensions)

    def order(trial: FrozenTrial) -> tuple[bool, float]:
        return (trial.state != TrialState.COMPLETE, trial.values[0] if trial.values else math.inf)

    rows: list[list[Cell]] = []
    for trial in sorted(trials, key=order):
        loss = trial.values[0] if trial.values else min(trial.intermediate_values.values(), default=None)
        drawn = dict(item.split("=", 1) for item in overrides(trial))
        logged = read_rows(study.folder_of(trial.number) / METRICS)
        how = STATES[trial.state] + (f", resumed {n} times" if (n := trial.user_attrs.get(RESTARTS)) else "")
        rows.append(
            [
                trial.number,
                trial.user_attrs.get(FAILURE, how),
                None if loss is None else f"{loss:.4f}",
                logged[-1]["step"] if logged else None,
                *(drawn.get(key) for key in keys),
            ]
        )
    return ["trial", "ended", f"lowest {metric}", "steps", *keys], rows
