"""Write the report on one or several runs as an HTML page without external files: it can be sent or printed as it is.

Names, settings and generated texts may contain anything; megagpt/html_parts.py escapes them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from megagpt import __version__
from megagpt.evaluation.tasks import TASKS
from megagpt.html_parts import (
    Cell,
    facts,
    figure,
    folded,
    note,
    page,
    quotation,
    section,
    side_by_side,
    table,
    without_middle,
)
from megagpt.report.curves import Curve, Marks, Point, color_of, marks, plot, points, short_number, thinned
from megagpt.report.data_card import data_card
from megagpt.report.run_record import RunReport
from megagpt.terminal import counted, duration

GENERATOR = "megagpt report"
LOSSES = ("train/loss", "val/loss")
OTHERS = {  # metric -> its caption
    "optim/lr": "learning rate",
    "optim/muon_lr": "learning rate of Muon",
    "optim/grad_norm": "gradient norm, before clipping",
    "optim/noise_scale": "gradient noise scale, sequences",
    "perf/tokens_per_sec": "tokens per second, over all ranks",
    "perf/mfu": "model FLOPs utilization",
    "perf/memory_gib": "peak memory of a rank, GiB",
}
MOST_METRICS = 24  # of a group
MOST_SAMPLED_STEPS, MOST_LETTERS = 20, 2000
MOST_STEPS_LISTED, MOST_LETTERS_OF_TITLE = 12, 100
AXES = {False: "step", True: "tokens"}


def page_of(runs: Sequence[RunReport], made: datetime) -> str:
    """Return the page. `made` is when its numbers were read."""
    names = ", ".join(run.name for run in runs)
    title = names if len(runs) == 1 else without_middle(f"{len(runs)} runs: {names}", MOST_LETTERS_OF_TITLE)
    when = made.astimezone().isoformat(sep=" ", timespec="seconds")
    parts = [note(f"As of {when}, by megagpt {__version__}."), _overview(runs), *_warnings(runs)]
    parts += [_losses(runs), _other_validation(runs), _tasks(runs), _optimization(runs), _samples(runs), _history(runs)]
    parts += [data_card(runs), _differences(runs), _settings(runs)]
    return page(title, parts, generator=GENERATOR)


def _overview(runs: Sequence[RunReport]) -> str:
    told = [_facts_of(run) for run in runs]
    if len(runs) == 1:
        return facts(told[0])
    names = list(dict.fromkeys(name for one in told for name in one))
    rows = [[run.name, *(one.get(name) for name in names)] for run, one in zip(runs, told, strict=True)]
    return table(["run", *names], rows)


def _facts_of(run: RunReport) -> dict[str, str]:
    last_step: int | None = run.settings.get("megagpt.schedule.max_steps")
    reached = f"{run.last_step:,}" + (f" of {last_step:,}" if isinstance(last_step, int) else "")
    train, val, speeds = (_finite(run, name) for name in (*LOSSES, "perf/tokens_per_sec"))
    best_step, lowest = min(val, key=lambda point: point[1], default=(0, None))
    times = [row["time"] for row in run.rows if row.get("time")]
    return {
        "state": _state(run, last_step),
        "steps": reached,
        "tokens": short_number(max((row.get("tokens_seen") or 0 for row in run.rows), default=0)),
        **({"last train/loss": f"{train[-1][1]:.4f}"} if train else {}),
        **({"lowest val/loss": f"{lowest:.4f} at step {best_step:,.0f}"} if lowest is not None else {}),
        **({"tokens per second, median": f"{median(speed for _, speed in speeds):,.0f}"} if speeds else {}),
        **({"time from first to last row": duration(max(times) - min(times))} if len(times) > 1 else {}),
    }


def _finite(run: RunReport, name: str) -> list[Point]:
    return [point for point in points(run, name, by_tokens=False) if not math.isnan(point[1])]


def _state(run: RunReport, last_step: Any) -> str:
    if run.newest is not None and run.newest.state.stopper.stopped:
        return "stopped early"
    return "finished" if isinstance(last_step, int) and run.last_step >= last_step else "not finished"


def _warnings(runs: Sequence[RunReport]) -> list[str]:
    """Return lines on runs that have logged nothing, broke numbers, restart without progress or cannot be compared."""
    lines = []
    for run in runs:
        if not run.rows:
            lines.append(f"{run.name} has logged nothing yet.")
        for name in [*LOSSES, *_of_sets(run, "val/loss"), *OTHERS]:
            broken = [int(step) for step, value in points(run, name, by_tokens=False) if math.isnan(value)]
            if broken:
                lines.append(f"{run.name}: {name} was not finite at {_steps(broken)}.")
        without_progress, reached = run.record.get("in_vain"), run.record.get("reached")
        if without_progress and isinstance(reached, int) and run.last_step <= reached:
            lines.append(f"{run.name}: the last {without_progress} starts did not get past step {reached}.")
    known = [run.newest.identity for run in runs if run.newest is not None]
    if len({identity.tokenizer for identity in known}) > 1:  # so their validation data differs too, as tokens
        lines.append(
            "These runs have different tokenizers: do not compare losses or perplexities. val/bits_per_byte compare if "
            "the validation text is the same."
        )
    elif len({str(identity.data.get("val")) for identity in known}) > 1:
        lines.append("These runs were validated on different data, so that their val/* cannot be compared.")
    return [note(line, "warning") for line in lines]


def _steps(steps: Sequence[int]) -> str:
    """Return "step 3", "steps 3, 4", or of many the first ones, their number and the last."""
    shown = [f"{step:,}" for step in steps]
    if len(shown) > MOST_STEPS_LISTED:
        shown = [*shown[: MOST_STEPS_LISTED - 2], f"... ({len(shown):,} in all)", shown[-1]]
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(shown)}"


def _losses(runs: Sequence[RunReport]) -> str:
    shown = []
    for by_tokens, axis in AXES.items():
        curves = [curve for i, run in enumerate(runs) for curve in _loss_curves(run, i, by_tokens, len(runs) > 1)]
        if curves:
            shown.append(_figure(f"loss, nats per token, by {axis}", curves, runs, by_tokens))
    if not shown:
        return section("Loss", note("No losses were logged."))
    how = "Pale: train/loss. With dots: val/loss." if len(runs) > 1 else ""
    n_points = max(len(points(run, name, by_tokens=False)) for run in runs for name in LOSSES)
    n_shown = max(len(thinned(points(run, name, by_tokens=False))) for run in runs for name in LOSSES)
    thin = (
        f"Curves are thinned, the longest from {n_points:,} points to {n_shown:,}: of each span of steps the lowest "
        "and the highest value are drawn."
    )
    legend = "Triangles below the axis: saves. Dashed: a resumed start. Dotted: a roll-back."
    lines = " ".join(filter(None, [how, legend, thin if n_shown < n_points else ""]))
    return section("Loss", note(lines), side_by_side(*shown))


def _loss_curves(run: RunReport, index: int, by_tokens: bool, is_one_of_many: bool) -> list[Curve]:
    """Return train/loss and val/loss: of one run in colors of theirs, and of each named set; of many in the run's."""
    curves: list[Curve] = []
    for i, name in enumerate(LOSSES if is_one_of_many else [*LOSSES, *_of_sets(run, "val/loss")]):
        color, style = color_of(index if is_one_of_many else i)
        label = name if not is_one_of_many else "" if curves else run.name
        if drawn := points(run, name, by_tokens=by_tokens):
            curves.append(
                Curve(label, drawn, color, style, is_sparse=name != "train/loss", is_pale=name == "train/loss")
            )
    return curves


def _of_sets(run: RunReport, metric: str) -> list[str]:
    """Return the names of a metric of each named validation set."""
    return list(dict.fromkeys(name for row in run.rows for name in row if name.startswith(f"{metric}/")))


def _figure(caption: str, curves: Sequence[Curve], runs: Sequence[RunReport], by_tokens: bool) -> str:
    marked: list[Marks] = []
    for i, run in enumerate(runs):
        color = "#666666" if len(runs) == 1 else color_of(i)[0]
        marked.append(marks(run, color, by_tokens=by_tokens))
    return figure(caption, plot(caption, curves, marked, AXES[by_tokens]))


def _metric_figure(name: str, caption: str, runs: Sequence[RunReport], *, by_tokens: bool = False) -> str:
    drawn = [(run, run.name, name) for run in runs]
    if len(runs) == 1 and (of_sets := _of_sets(runs[0], name)):
        drawn = [(runs[0], one, one) for one in (name, *of_sets)]
    curves = []
    for i, (run, label, metric) in enumerate(drawn):
        color, style = color_of(i)
        if of_run := points(run, metric, by_tokens=by_tokens):
            curves.append(Curve(label, of_run, color, style, is_sparse=metric.startswith("val/")))
    return _figure(caption, curves, runs, by_tokens) if curves else ""


def _other_validation(runs: Sequence[RunReport]) -> str:
    # The sets of a single run are drawn in one figure with their mean.
    names = [name for name in _names(runs, "val/") if len(runs) > 1 or name.count("/") == 1]
    return _group("Validation", [name for name in names if name != "val/loss"], runs, AXES)


def _tasks(runs: Sequence[RunReport]) -> str:
    return _group("Tasks", _names(runs, TASKS), runs, {False: "step"})


def _names(runs: Sequence[RunReport], group: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for row in run.rows for name in row if name.startswith(group)))


def _group(title: str, names: Sequence[str], runs: Sequence[RunReport], axes: Mapping[bool, str]) -> str:
    """Return a section with a figure for each metric and axis, or nothing if none of them has a number."""
    shown = [
        drawn
        for name in names[:MOST_METRICS]
        for by_tokens, axis in axes.items()
        if (drawn := _metric_figure(name, f"{name} by {axis}", runs, by_tokens=by_tokens))
    ]
    left_out = (
        f"{len(names) - MOST_METRICS} more metrics of this group are not drawn." if len(names) > MOST_METRICS else ""
    )
    return section(title, *([note(left_out)] if left_out else []), side_by_side(*shown)) if shown else ""


def _optimization(runs: Sequence[RunReport]) -> str:
    shown = [drawn for name, what in OTHERS.items() if (drawn := _metric_figure(name, f"{name}: {what}", runs))]
    return section("Optimization and speed", side_by_side(*shown)) if shown else ""


def _samples(runs: Sequence[RunReport]) -> str:
    parts = []
    for run in runs:
        by_step: dict[int, list[str]] = {}
        for row in run.samples:
            prompt, more = row["prompt"], row["continuation"]
            where = f"after {prompt[:200]!r}" if prompt else "a new document"
            by_step.setdefault(row["step"], []).append(quotation(where, _cut(more)))
        steps = sorted(by_step, reverse=True)
        shown = _spread(steps, MOST_SAMPLED_STEPS)
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        parts += [folded(f"{of_run}step {step:,}", *by_step[step], is_open=step == steps[0]) for step in shown]
        if len(shown) < len(steps):
            parts.append(note(f"{of_run}{len(shown)} of {len(steps):,} steps with samples, evenly spread."))
        if not steps:
            parts.append(note(f"{run.name} has no samples.jsonl: it sampled nothing, or an older megagpt wrote it."))
    return section("Samples", *parts)


def _cut(sample: str) -> str:
    left_out = len(sample) - MOST_LETTERS
    return sample if left_out <= 0 else f"{sample[:MOST_LETTERS]}\n... {left_out:,} more characters"


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most that many, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _history(runs: Sequence[RunReport]) -> str:
    parts = []
    for run in runs:
        saves = run.steps_with("perf/save_seconds")
        best = f"; the best checkpoint is that of step {run.best_step:,}" if run.best_step is not None else ""
        shown = [note(f"Saved at {_steps(saves)}{best}." if saves else "Nothing was saved yet.")]
        shown += [
            note(f"Rolled back from step {back.from_step:,} to step {back.to_step:,}.") for back in run.roll_backs
        ]
        rows: list[list[Cell]] = [[one.time, one.where, one.command, one.step] for one in run.starts]
        if rows:
            shown.append(table(["start", "with", "command", "from step"], rows, names=3))
            shown.append(quotation("The newest start said:", "\n".join(run.opening[:12])) if run.opening else "")
        else:
            shown.append(note("There is no train.log, which lists the starts."))
        parts += [folded(f"{run.name}: {counted(len(rows), 'start')}", *shown, is_open=len(runs) == 1)]
    return section("Saves, starts and environment", *parts)


def _differences(runs: Sequence[RunReport]) -> str:
    if len(runs) < 2:
        return ""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differ = [key for key in keys if len({_shown(run, key) for run in runs}) > 1]
    if not differ:
        return section("Differences of the run files", note("None."))
    rows = [[key, *(_shown(run, key) for run in runs)] for key in differ]
    return section(
        "Differences of the run files", table(["key", *(run.name for run in runs)], rows, names=1 + len(runs))
    )


def _shown(run: RunReport, key: str) -> str:
    """Return a key's value as a run file has it."""
    return json.dumps(run.settings[key], ensure_ascii=False) if key in run.settings else "-"


def _settings(runs: Sequence[RunReport]) -> str:
    parts = [
        folded(run.name, table(["key", "value"], [[key, _shown(run, key)] for key in run.settings], names=2))
        if run.settings
        else note(f"{run.name} has no run.json.")
        for run in runs
    ]
    return section("Run file" if len(runs) == 1 else "Run files", *parts)
