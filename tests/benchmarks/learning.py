"""How much recipes learn from the same tokens: loss against tokens and seconds, for any text.

    python tests/benchmarks/learning.py --json learning_char_cpu.json
    python tests/benchmarks/learning.py --input TEXT... --seeds 1 --steps 500

The shape and budget of ds_configs/char_cpu.json (nanoGPT's setting for a CPU: 4 layers, 128 wide, 64 characters, batch
12, 2,000 steps), on five modules of Python's standard library unless --input names other texts. Each recipe is a run
file or one with overrides; each run is `megagpt train`, in a process with one thread, as many beside each other as
there are cores, in an order that takes turns between recipes. The validation loss is over all validation tokens.
`plain` is GPT-2 with AdamW at nanoGPT's rate for this setting, `tuned` the same with its best rate of RATES.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from throughput_table import commit, hardware

from data_tools.build import build
from data_tools.config import BuildConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
RATES = (0.002, 0.004, 0.008)
MUON = ["optimizer.type=Muon", "optimizer.params.lr=0.005", "optimizer.params.muon_lr=0.0088"]
DECAY = ["megagpt.schedule.shape=warmup-stable-decay", "megagpt.schedule.min_lr_ratio=0"]
RECIPES = {
    "plain": ("char_cpu.json", []),
    **{f"AdamW {rate:g}": ("char_cpu.json", [f"optimizer.params.lr={rate:g}"]) for rate in RATES},
    "Muon": ("char_cpu.json", [*MUON, *DECAY]),
    "speedrun blocks, AdamW": ("char_cpu.json", ["megagpt.model.preset=speedrun", "optimizer.params.lr=0.003", *DECAY]),
    "llama blocks, AdamW": ("char_cpu.json", ["megagpt.model.preset=llama", "optimizer.params.lr=0.004"]),
    "speedrun": ("char_cpu_speedrun.json", []),
}


def dataset(texts: list[Path], folder: Path) -> Path:
    build(texts, folder, BuildConfig(tokenizer_type="char", vocab_size=512, val_fraction=0.1, split_text_at="\n\n"))
    return folder


def train(recipe: str, seed: int, steps: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train one run; returns its validation curve, step -> loss, and its processor seconds."""
    run_file, options = RECIPES[recipe]
    out_dir = folder / f"{recipe}, seed {seed}".replace(" ", "_")
    decays = [f"megagpt.schedule.decay_steps={steps // 2}"] if DECAY[0] in options or recipe == "speedrun" else []
    command = [sys.executable, "-m", "megagpt", "train", str(CONFIGS / run_file), *options, *decays]
    command += [f"megagpt.data.train.0.path={data}", f"megagpt.data.val={data}", "megagpt.data.val_tokens=null"]
    command += [f"megagpt.out_dir={out_dir}", f"megagpt.seed={seed}", f"megagpt.data.seed={seed}"]
    command += [f"megagpt.schedule.max_steps={steps}", "tensorboard.enabled=false"]
    if recipe != "speedrun":
        command.append(f"megagpt.schedule.warmup_steps={steps // 20}")  # 100 of 2,000, as in the run file
    command += [f'megagpt.every={{"log": 100, "eval": {max(1, steps // 20)}, "save": 0, "sample": 0}}']
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    per_step = [row["perf/seconds_per_step"] for row in rows if "perf/seconds_per_step" in row]
    step_seconds = statistics.median(per_step) if per_step else None
    return {"curve": losses, "wall_seconds": time.perf_counter() - began, "step_seconds": step_seconds}


def reached(curve: dict[int, float], loss: float) -> int | None:
    """Return the first evaluated step with at most this loss."""
    return next((step for step, found in sorted(curve.items()) if found <= loss), None)


def table(runs: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Markdown: last losses and their range over seeds, and when the plain run's last loss was reached."""
    last = {recipe: [run["curve"][steps] for run in of] for recipe, of in runs.items()}
    goal = statistics.mean(last["plain"])
    lines = ["| recipe | val/loss (lowest to highest of the seeds) | less than plain | plain's loss reached after |"]
    lines.append("|---|---|---|---|")
    for recipe, losses in last.items():
        mean = statistics.mean(losses)
        first = [reached(run["curve"], goal) for run in runs[recipe]]
        late = [steps if step is None else step for step in first]
        when = "-" if None in first or recipe == "plain" else f"{max(late) / steps:.0%} of the tokens"
        lines.append(f"| {recipe} | {mean:.4f} ({min(losses):.4f} to {max(losses):.4f}) | {goal - mean:.4f} | {when} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = args.input or [stdlib / f"{name}.py" for name in ("argparse", "doctest", "inspect", "pydoc", "typing")]
    recipes = ["plain", *(recipe for recipe in args.recipes if recipe != "plain")]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        data = dataset(texts, Path(name, "data"))
        jobs = {
            (recipe, seed): pool.submit(train, recipe, seed, args.steps, data, Path(name))
            for seed, recipe in product(range(args.seeds), recipes)
        }
        runs = {recipe: [jobs[recipe, seed].result() for seed in range(args.seeds)] for recipe in recipes}
    print(table(runs, args.steps))
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "torch": torch.__version__, **hardware("cpu")}
        args.json.write_text(json.dumps(facts | {"steps": args.steps, "seeds": args.seeds, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
