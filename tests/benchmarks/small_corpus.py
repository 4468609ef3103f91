"""Validation loss and overfitting on a small text read many times: plain GPT-2, and ds_configs/small_corpus.json.

    python tests/benchmarks/small_corpus.py --json small_corpus_cpu.json
    python tests/benchmarks/small_corpus.py --input TEXT... --seeds 1 --recipes regularized

The text is Python's shutil.py (43,000 training characters, a fifth of the text held out) unless --input names others;
2,000 steps of 12 times 64 tokens read it 36 times. Each run is `megagpt train` with one thread, one after another.
`plain` is ds_configs/char_cpu.json, GPT-2 with AdamW and without dropout, as nanoGPT trains in this setting, at three
learning rates; the best of their mean losses is what the regularized recipe is compared with. A run's best loss is what
early stopping would keep, and overfitting is its last loss less its best.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from throughput_table import commit, hardware

from data_tools.build import build
from data_tools.config import BuildConfig

CONFIGS = Path(__file__).parents[2] / "ds_configs"
RECIPES = {
    **{f"plain {rate:g}": ("char_cpu.json", [f"optimizer.params.lr={rate:g}"]) for rate in (0.001, 0.002, 0.004)},
    "regularized": ("small_corpus.json", []),
}
STEPS = 2000


def train(recipe: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train one run; returns its validation curve with the best loss, the last, and their difference."""
    run_file, options = RECIPES[recipe]
    out_dir = folder / f"{recipe}_{seed}".replace(" ", "_")
    command = [sys.executable, "-m", "megagpt", "train", str(CONFIGS / run_file), *options]
    command += [f"megagpt.data.train.0.path={data}", f"megagpt.data.val={data}", "megagpt.data.val_tokens=null"]
    command += [f"megagpt.out_dir={out_dir}", f"megagpt.seed={seed}", f"megagpt.data.seed={seed}"]
    command += ["tensorboard.enabled=false", "megagpt.early_stopping.restore_best=false"]
    command += [
        f"megagpt.schedule.max_steps={STEPS}",
        'megagpt.every={"log": 100, "eval": 100, "save": 0, "sample": 0}',
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    best, last = min(curve.values()), curve[max(curve)]
    found = {"best": best, "last": last, "overfitting": last - best, "curve": curve}
    print(f"{recipe}, seed {seed}: best {best:.4f}, last {last:.4f}", flush=True)
    return found


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: means over seeds, the range of the best loss, and how far the best plain recipe is above it."""
    plain = min((mean(of, "best") for recipe, of in runs.items() if recipe.startswith("plain")), default=None)
    lines = [
        "| recipe | best val/loss (lowest to highest of the seeds) | less than the best plain | last | overfitting |"
    ]
    lines.append("|---|---|---|---|---|")
    for recipe, of in runs.items():
        best = [run["best"] for run in of]
        less = "-" if plain is None else f"{plain - statistics.mean(best):.4f}"
        lines.append(
            f"| {recipe} | {statistics.mean(best):.4f} ({min(best):.4f} to {max(best):.4f}) | {less} | "
            f"{mean(of, 'last'):.4f} | {mean(of, 'overfitting'):.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = args.input or [Path(sysconfig.get_path("stdlib"), "shutil.py")]
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        runs: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in args.recipes}
        build(texts, data, BuildConfig(tokenizer_type="char", vocab_size=512, val_fraction=0.2, split_text_at="\n\n"))
        for seed, recipe in product(range(args.seeds), args.recipes):
            runs[recipe].append(train(recipe, seed, data, Path(name)))
    print(table(runs))
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "torch": torch.__version__, **hardware("cpu")}
        args.json.write_text(json.dumps(facts | {"steps": STEPS, "seeds": args.seeds, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
