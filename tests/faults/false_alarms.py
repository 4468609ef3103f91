r"""How often the spike detector speaks in runs that nothing was done to, and what it would have seen: one line a rule.

    PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 \
        python tests/faults/false_alarms.py --lr 0.001 --seeds 20 40 --steps 200

The debug run on one rank. A leap is known without any rule: a loss 0.3 nats or a gradient norm ten times above the
median of the 20 steps before. What is injected into ten steps of each run is what the rule is asked, not trained on.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from support import build_dataset, debug_run, metric
from torch import Tensor

from megagpt.config.guards import SpikesConfig
from megagpt.distributed.process_group import init_process_group
from megagpt.guards.spikes import is_spike
from megagpt.train.trainer import train

CFG = SpikesConfig()
FIRST = CFG.window // 2  # steps are judged from here on
INJECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "norm x 3": lambda now: now * torch.tensor([1.0, 3.0]),
    "norm x 10": lambda now: now * torch.tensor([1.0, 10.0]),
    "loss + 0.5": lambda now: now + torch.tensor([0.5, 0.0]),
    "loss + 1": lambda now: now + torch.tensor([1.0, 0.0]),
}


def standard_deviations(history: Tensor, now: Tensor, cfg: SpikesConfig) -> Tensor:
    """The rule of OLMo-core's SkipStepOptimizer, and ours until it was measured here."""
    std, mean = torch.std_mean(history, dim=1)
    return (now > mean + cfg.sigma * std).any()


RULES = {
    "medians of logarithms": lambda history, now, cfg: is_spike(history, now, cfg).any(),
    "mean and standard deviation": standard_deviations,
}


def curves(lr: str, seed: int, steps: int, dataset: Path, folder: Path, device: torch.device) -> Tensor:
    """(2, steps): loss and gradient norm."""
    options = [f"megagpt.seed={seed}", f"megagpt.data.seed={seed}", f"megagpt.schedule.max_steps={steps}"]
    options += [f"optimizer.params.lr={lr}", f"zero_optimization.stage={seed % 4}", "tensorboard.enabled=false"]
    options += ['megagpt.every={"log": 1, "eval": 0, "save": 0}', "megagpt.guards.spikes.action=none"]
    train(debug_run(dataset, folder, *options), device)
    values = [list(metric(folder, name).values()) for name in ("train/loss", "optim/grad_norm")]
    return torch.tensor(values, dtype=torch.float64)


def is_leap(run: Tensor, i: int) -> bool:
    loss, norm = run[:, i - 20 : i].median(dim=1).values
    return bool(run[0, i] > loss + 0.3 or run[1, i] > 10 * norm)


def judged(runs: list[Tensor], rule: Callable[[Tensor, Tensor, SpikesConfig], Tensor]) -> dict[str, object]:
    def speaks(run: Tensor, i: int, now: Tensor) -> bool:
        return bool(rule(run[:, max(0, i - CFG.window) : i], now, CFG))

    said = [[i for i in range(FIRST, run.size(1)) if speaks(run, i, run[:, i])] for run in runs]
    leaps = [[i for i in range(FIRST, run.size(1)) if is_leap(run, i)] for run in runs]
    false = [set(spoken) - set(leapt) for spoken, leapt in zip(said, leaps, strict=True)]
    seen = sum(len(set(spoken) & set(leapt)) for spoken, leapt in zip(said, leaps, strict=True))
    asked = [(run, i) for run in runs for i in range(FIRST, run.size(1), (run.size(1) - FIRST) // 10)]
    shares = {
        name: sum(speaks(run, i, change(run[:, i])) for run, i in asked) / len(asked)
        for name, change in INJECTED.items()
    }
    return {
        "runs": len(runs),
        "runs in which it spoke": sum(map(bool, said)),
        "runs in which it spoke of no leap": sum(map(bool, false)),
        "times that it spoke of no leap": sum(map(len, false)),
        "leaps": sum(map(len, leaps)),
        "leaps seen": seen,
        "of what was injected": {name: f"{share:.0%}" for name, share in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", default="0.001")
    parser.add_argument("--seeds", type=int, nargs=2, default=(20, 40))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    device = init_process_group()
    with tempfile.TemporaryDirectory(prefix="false_alarms_") as name:
        home = Path(name)
        dataset = build_dataset(home / "corpus")
        seeds = range(*args.seeds)
        runs = [curves(args.lr, seed, args.steps, dataset, home / str(seed), device) for seed in seeds]
    for name, rule in RULES.items():
        print(json.dumps({"rule": name, "lr": args.lr, "seeds": args.seeds, "steps": args.steps, **judged(runs, rule)}))


if __name__ == "__main__":
    main()
