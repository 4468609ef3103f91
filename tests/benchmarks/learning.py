"""How much recipes learn from the same tokens: loss against tokens and against seconds, for any text.

    python tests/benchmarks/learning.py --json learning_cpu.json --plot learning_cpu.svg
    python tests/benchmarks/learning.py --input TEXT... --seeds 1 --steps 500
    python tests/benchmarks/learning.py --ablation --seeds 1
    python tests/benchmarks/learning.py --model '{"n_layer": 6, "n_head": 6, "n_embd": 384, "seq_len": 256}' --seeds 1

The shape and budget of ds_configs/char_cpu.json (nanoGPT's setting for a CPU: 4 layers, 128 wide, 64 characters, batch
12, 2,000 steps), on the source files of Python's standard library, of which a run reads a part once, unless --input
names other texts. Each run is a process with one thread, as many beside each other as there are cores, in an order that
takes turns between recipes. The validation loss is over the first --val-tokens tokens of the validation split.

Peers, at nanoGPT's rate for this setting, on the rows of the same sampler: `plain loop`, a GPT-2 written in plain
PyTorch, and `Trainer`, Hugging Face's with its GPT2LMHeadModel. Ours are run files of ds_configs/ with overrides, each
by `megagpt train`. Goals are measured against the plain loop: how much lower the loss is after equal tokens, and, with
`speedrun, third of the tokens`, what a run that is planned for a third of them reaches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from throughput_table import commit, hardware

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.config.model import PRESETS
from megagpt.svg_plots import COLORS, svg

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
PLAIN = "plain loop"
PEERS = {PLAIN: "loop", "Trainer": "trainer"}
RATES = (0.002, 0.004, 0.008)
RECIPES: dict[str, tuple[str, list[str]]] = {
    "GPT-2": ("char_cpu.json", []),
    **{f"GPT-2, AdamW {rate:g}": ("char_cpu.json", [f"optimizer.params.lr={rate:g}"]) for rate in RATES},
    "speedrun": ("char_cpu_speedrun.json", []),
    "speedrun, third of the tokens": ("char_cpu_speedrun.json", []),
}


def ablations() -> dict[str, tuple[str, list[str]]]:
    """Speedrun with each choice of its own taken back to GPT-2's, and GPT-2 with each choice of its optimizer."""
    speedrun, gpt2 = PRESETS["speedrun"], PRESETS["gpt2"]
    found = {}
    for key, value in speedrun.items():
        model = {**json.loads((CONFIGS / "char_cpu.json").read_text())["megagpt"]["model"], **speedrun}
        model[key] = gpt2[key]
        found[f"speedrun, {key} {gpt2[key]} in place of {value}"] = (
            "char_cpu_speedrun.json",
            ["megagpt.model=" + json.dumps(model)],
        )
    found["speedrun, AdamW 0.004 in place of Muon"] = (
        "char_cpu_speedrun.json",
        [
            'optimizer={"type": "AdamW", "params": '
            '{"lr": 0.004, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}}',
            "megagpt.schedule.warmup_steps=100",
        ],
    )
    found["GPT-2, Muon"] = ("char_cpu_speedrun.json", ['megagpt.model.preset="gpt2"'])
    return found


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    data: Path
    folder: Path
    steps: int
    options: list[str]  # of the run files
    recipes: dict[str, tuple[str, list[str]]]

    def options_of(self, recipe: str, seed: int) -> tuple[str, list[str], Path]:
        """Return a recipe's run file, its options and its folder."""
        steps = self.steps // 3 if recipe.endswith("third of the tokens") else self.steps
        run_file, options = self.recipes.get(recipe, ("char_cpu.json", []))
        out_dir = self.folder / f"{recipe}, seed {seed}".replace(" ", "_")
        schedule = json.loads((CONFIGS / run_file).read_text())["megagpt"]["schedule"]
        of_run_file = 2000  # all lengths shrink or grow with the budget
        lengths = [
            f"megagpt.schedule.{key}={round(schedule[key] * steps / of_run_file)}"
            for key in ("warmup_steps", "decay_steps")
            if key in schedule
        ]
        return (
            run_file,
            [
                *lengths,
                *self.options,
                *options,
                f"megagpt.data.train.0.path={self.data}",
                f"megagpt.data.val={self.data}",
                f"megagpt.out_dir={out_dir}",
                f"megagpt.seed={seed}",
                f"megagpt.data.seed={seed}",
                f"megagpt.schedule.max_steps={steps}",
                f'megagpt.every={{"log": {max(1, steps // 40)}, "eval": {max(1, steps // 20)}, "save": 0}}',
                "tensorboard.enabled=false",
            ],
            out_dir,
        )


def train(recipe: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Train one run; returns its validation curve, step -> loss, and the median seconds of its steps."""
    run_file, options, out_dir = setting.options_of(recipe, seed)
    if recipe in PEERS:
        program = [str(ROOT / "tests" / "benchmarks" / "learning_peers.py"), PEERS[recipe]]
    else:
        program = ["-m", "megagpt", "train"]
    command = [sys.executable, *program, str(CONFIGS / run_file), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    step_seconds = statistics.median(row["perf/seconds_per_step"] for row in rows if "perf/seconds_per_step" in row)
    print(f"{recipe}, seed {seed}: {losses[max(losses)]:.4f}, {1000 * step_seconds:.1f} ms a step", file=sys.stderr)
    return {"curve": losses, "step_seconds": step_seconds}


def reached(curve: dict[int, float], loss: float) -> int | None:
    """Return the first evaluated step with at most this loss."""
    return next((step for step, found in sorted(curve.items()) if found <= loss), None)


def table(runs: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Markdown: last losses and their range over seeds, the cost of a step, and when the plain loop's loss is reached.

    Seconds are those of as many steps, of each run's median; ratios are of means over seeds.
    """
    plain = runs[PLAIN]
    goal = statistics.mean(run["curve"][steps] for run in plain)
    plain_step = statistics.mean(run["step_seconds"] for run in plain)
    lines = ["| recipe | val/loss (lowest to highest) | below plain | step | plain's last loss after |"]
    lines.append("|---|---|---|---|---|")
    for recipe, of in runs.items():
        losses = [run["curve"][max(run["curve"])] for run in of]
        cost = statistics.mean(run["step_seconds"] for run in of) / plain_step
        first = [reached(run["curve"], goal) for run in of]
        when = "-"
        if None not in first and recipe != PLAIN:
            share = max(step for step in first if step is not None) / steps
            when = f"{share:.0%} of the tokens, {share * cost:.0%} of the seconds"
        spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        lines.append(f"| {recipe} | {spread} | {goal - statistics.mean(losses):.4f} | {cost:.2f} | {when} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]], tokens_per_step: int) -> str:
    """Draw each recipe's mean curve over tokens and over seconds, as SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for (recipe, of), color in zip(runs.items(), COLORS * 9, strict=False):
            steps = sorted(of[0]["curve"])
            losses = [statistics.mean(run["curve"][step] for run in of) for step in steps]
            seconds = statistics.mean(run["step_seconds"] for run in of)
            axes[0].plot([step * tokens_per_step / 1e6 for step in steps], losses, color=color, label=recipe)
            axes[1].plot([step * seconds for step in steps], losses, color=color)
        axes[0].set_xlabel("million tokens")
        axes[1].set_xlabel("seconds of steps, one thread")
        axes[0].set_ylabel("validation loss, nats per token")
        axes[0].set_ylim(top=2 * min(min(run["curve"].values()) for of in runs.values() for run in of))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.set_layout_engine("constrained")

    return svg("learning", 9.0, 4.5, draw)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="texts, or folders of *.py files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--val-tokens", type=int, default=128_000)
    parser.add_argument("--model", type=json.loads, default={}, help="sizes in place of the run files', as JSON")
    parser.add_argument("--ablation", action="store_true", help="speedrun without each of its choices")
    parser.add_argument("--recipes", nargs="+", default=None, help="some of them; the plain loop always runs")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    every = {**dict.fromkeys(PEERS, ("char_cpu.json", [])), **RECIPES}
    if args.ablation:
        every = {PLAIN: every[PLAIN], "speedrun": every["speedrun"], **ablations()}
    if unknown := set(args.recipes or ()) - every.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: no recipe; there are {', '.join(every)}")
    recipes = [PLAIN, *(recipe for recipe in args.recipes or every if recipe != PLAIN)]
    options = [f"megagpt.model.{key}={value}" for key, value in args.model.items()]
    options += [f"megagpt.data.val_tokens={args.val_tokens}", *args.option]
    texts = args.input or [Path(sysconfig.get_path("stdlib"))]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        data = Path(name, "data")
        build(texts, data, BuildConfig(tokenizer_type="char", vocab_size=512, val_fraction=0.03, include="*.py"))
        setting = Setting(data, Path(name), args.steps, options, every)
        order = list(product(range(args.seeds), recipes))
        done = list(pool.map(lambda job: train(job[1], job[0], setting), order))
    runs = {recipe: [run for (_, of), run in zip(order, done, strict=True) if of == recipe] for recipe in recipes}
    print(table(runs, args.steps))
    if args.plot:
        batch = json.loads((CONFIGS / "char_cpu.json").read_text())
        tokens = batch["train_batch_size"] * args.model.get("seq_len", batch["megagpt"]["model"]["seq_len"])
        args.plot.write_text(plot(runs, tokens))
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "torch": torch.__version__, **hardware("cpu")}
        asked = {"steps": args.steps, "seeds": args.seeds, "options": options}
        args.json.write_text(json.dumps(facts | asked | {"runs": runs}, indent=1))


if __name__ == "__main__":
    main()
