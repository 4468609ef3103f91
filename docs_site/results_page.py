"""Write the page of plots from the measurements that are kept as JSON in tests/benchmarks and tests/faults."""

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docs_site.markdown import page
from megagpt.svg_plots import COLORS, LEGEND, svg

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
FAULTS = ROOT / "tests" / "faults" / "results.jsonl"
WIDTH = 6.4  # inches
VERDICTS = {"recovered": COLORS[2], "refused": COLORS[0], "stuck": COLORS[1], "silently wrong": COLORS[5]}
INTRODUCTION = """Drawn from the files of the measurements when this site is built.
[Benchmarks](../tests/benchmarks/RESULTS.md) and [injected faults](../tests/faults/RESULTS.md) have the tables, the
machines, the goals that were missed, and how to measure again. All of it ran on two CPU cores; nothing was measured on
a GPU yet."""


def write_results(folder: Path) -> None:
    """Write the page and its pictures into a folder."""
    folder.mkdir(parents=True)
    parts = [INTRODUCTION]
    for name, (title, text, height, draw, source) in PLOTS.items():
        (folder / f"{name}.svg").write_text(svg(name, WIDTH, height, draw), encoding="utf-8")
        parts += [f"## {title}", f"{text} ({_origin(source)})", f"![{title}]({name}.svg)"]
    (folder / "plots.md").write_text(page("Results in plots", parts), encoding="utf-8")


def _read(name: str) -> Any:
    return json.loads((BENCHMARKS / name).read_text())


def _origin(source: str) -> str:
    """Return the file of a measurement, with its date and commit where it has them."""
    if not source.endswith(".json"):
        return f"`{source}`"
    facts = _read(source)
    return f"`tests/benchmarks/{source}`, {facts['date']}, commit {facts['commit'].rstrip('+')}"


def _learning(figure: Figure) -> None:
    axes = figure.subplots()
    for color, (name, runs) in zip(COLORS, _read("learning_cpu.json")["runs"].items(), strict=False):
        steps = sorted(map(int, runs[0]["curve"]))
        losses = [[run["curve"][str(step)] for run in runs] for step in steps]
        axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, list(map(statistics.median, losses)), color=color, label=name)
    axes.set(xlabel="step of 768 tokens", ylabel="val/loss, nats per character", ylim=(1.1, 2.6))
    axes.legend(**LEGEND)
    figure.tight_layout()


def _throughput(source: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        names = {"ours": "megagpt", "plain": "its model in a plain loop", "hf": "Hugging Face, bare loop"}
        names |= {"gpt2-fp32": "a plain fp32 GPT-2", "ours zero_optimization.stage=0": "megagpt, ZeRO stage 0"}
        rows = {names.get(name, name): row for name, row in _read(source)["contestants"].items()}
        _bars(figure, {name: row["tokens_per_sec_of_turns"] for name, row in rows.items()}, "tokens per second")

    return draw


def _bars(figure: Figure, rows: dict[str, list[float]], label: str) -> None:
    """Draw the median of each row as a bar, and its range as a line."""
    axes = figure.subplots()
    middle = [statistics.median(values) for values in rows.values()]
    below = [at - min(values) for at, values in zip(middle, rows.values(), strict=True)]
    above = [max(values) - at for at, values in zip(middle, rows.values(), strict=True)]
    axes.barh(list(rows), middle, xerr=[below, above], color=COLORS[0], ecolor="#333333")
    axes.invert_yaxis()
    axes.set(xlabel=label)
    figure.tight_layout()


def _saving(figure: Figure) -> None:
    seconds = _read("saving_cpu_350m.json")["seconds"]
    names = {"at_once": "save, training waits", "stall": "save_async, training waits", "memcpy": "a copy in memory"}
    _bars(figure, {text: seconds[name] for name, text in names.items()}, "seconds")


def _generation(figure: Figure) -> None:
    rows = {
        f"{row['dtype']}, prompt {row['prompt']}, batch {row['batch']}, {row['way']}": [row["ratio"]]
        for row in _read("generation_cpu.json")["rows"]
    }
    _bars(figure, rows, "tokens per second of megagpt, over those of transformers")


def _faults(figure: Figure) -> None:
    cases = [json.loads(line) for line in FAULTS.read_text().splitlines()]
    groups = {(case["system"], case["group"]) for case in cases}
    bars = sorted(groups, key=lambda pair: (pair[1], pair[0] != "megagpt"))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for verdict, color in VERDICTS.items():
        counted = Counter((case["system"], case["group"]) for case in cases if case["verdict"] == verdict)
        all_of = Counter((case["system"], case["group"]) for case in cases)
        share = [100 * counted[bar] / all_of[bar] for bar in bars]
        axes.barh([f"{group}, {system}" for system, group in bars], share, left=left, color=color, label=verdict)
        left = [one + more for one, more in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="percent of the cases of a group", xlim=(0, 100))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **LEGEND)
    figure.tight_layout()


# Name of the picture -> title, what it shows, height in inches, who draws it, the file of the numbers.
PLOTS: dict[str, tuple[str, str, float, Callable[[Figure], None], str]] = {
    "learning": (
        "What recipes learn",
        "Validation loss over the tokens of Python's standard library, read once: the median of three seeds, and their "
        "range pale.",
        3.6,
        _learning,
        "learning_cpu.json",
    ),
    "throughput": (
        "Training speed",
        "GPT-2 with 124 million parameters, steps of 8,192 tokens, ZeRO stage 1: the median of three turns, and their "
        "range.",
        2.2,
        _throughput("throughput_cpu_8192_bf16.json"),
        "throughput_cpu_8192_bf16.json",
    ),
    "saving": (
        "What a save costs",
        "A model of 350 million parameters, 5.7 GB on disk: the median of eight saves, and their range.",
        1.7,
        _saving,
        "saving_cpu_350m.json",
    ),
    "generation": (
        "Generating text",
        "128 tokens by the same weights of GPT-2 with 124 million parameters, in processor time.",
        3.6,
        _generation,
        "generation_cpu.json",
    ),
    "faults": (
        "Injected faults",
        "Letters of groups and verdicts are those of [its page](../tests/faults/RESULTS.md).",
        5.2,
        _faults,
        "tests/faults/results.jsonl",
    ),
}
