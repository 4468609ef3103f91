"""Faults injected on rank 1 of two real gloo ranks, in one launch; test_guards.py judges what both ranks saw."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from support import debug_run, metric, run_scenarios

from megagpt import guards, session, trainer
from megagpt.commits import committed
from megagpt.distributed import init_process_group, rank
from megagpt.errors import UserError
from megagpt.loss import Score

DEVICE = init_process_group()
EACH = ["megagpt.every.log=4", "megagpt.every.eval=0", "megagpt.data.val_tokens=128", "tensorboard.enabled=false"]
SPIKES = 'megagpt.guards.spikes={{"action": "{}", "window": 16}}'


class Faulty:
    """A run in which rank 1's loss has a factor in some steps, with what was said and the weights after each step."""

    def __init__(self, factors: dict[int, float] | None = None, act: Callable[[int, Any], None] | None = None) -> None:
        self.factors, self.act = factors or {}, act or (lambda step, module: None)
        self.steps, self.said, self.weights = 0, [], []
        self.originals = trainer.train_step, trainer.next_token_score, session.say

    def __enter__(self) -> "Faulty":
        train_step, next_token_score, _ = self.originals

        def step(run: Any, batches: Any) -> Any:
            self.steps += 1
            result = train_step(run, batches)
            self.weights.append(digest(run.engine.module))
            if rank() == 1:
                self.act(self.steps, run.engine.module)
            return result

        def score(*args: Any, **kw: Any) -> Score:
            inner, factor = next_token_score(*args, **kw), self.factors.get(self.steps, 1.0) if rank() == 1 else 1.0
            return lambda x, weight: inner(x, weight) * factor

        trainer.train_step, trainer.next_token_score, session.say = step, score, self.said.append
        return self

    def __exit__(self, *_: object) -> None:
        trainer.train_step, trainer.next_token_score, session.say = self.originals

    def train(self, dataset: Path, out_dir: Path, *more: str, stop_at: int | None = None) -> dict[str, Any]:
        state, message = None, ""
        try:
            state = trainer.train(debug_run(dataset, out_dir, *EACH, *more), DEVICE, stop_at=stop_at)
        except UserError as error:
            message = str(error)
        return {
            "message": message,
            "said": [line for line in self.said if " changed: " not in line and "layers" not in line],
            "weights": self.weights,
            "state": None if state is None else asdict(state),
            "committed": [path.name for path in committed(out_dir)],
            "loss": metric(out_dir, "loss/train"),
        }


def digest(module: torch.nn.Module) -> str:
    """sha256 of what this rank holds of each parameter."""
    whole = hashlib.sha256()
    for p in module.parameters():
        whole.update(getattr(p, "ds_tensor", p).detach().float().numpy().tobytes())
    return whole.hexdigest()


def one_step_that_is_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for stage in range(4):
        for dtype in ("fp32", "bf16"):
            kind = [f"zero_optimization.stage={stage}", f"bf16.enabled={json.dumps(dtype == 'bf16')}"]
            with Faulty({5: float("nan")}) as run:
                name = f"stage {stage} {dtype}"
                found[name] = run.train(dataset, folder / name, *kind, "megagpt.schedule.max_steps=7")
    return found


def three_steps_in_a_row_that_are_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    with Faulty(dict.fromkeys((2, 6, 7, 8), float("inf"))) as run:
        return run.train(dataset, folder / "run", "megagpt.every.save=5")


def a_spike(dataset: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for action in ("none", "log", "skip", "stop", "roll back"):
        for stage in (0, 1) if action == "skip" else (1,):
            options = [f"zero_optimization.stage={stage}", SPIKES.format(action), "megagpt.every.save=6"]
            with Faulty({14: 30.0}) as run:
                found[f"{action} {stage}"] = run.train(dataset, folder / f"{action} {stage}", *options)
    with Faulty({14: 30.0}) as run:
        run.train(dataset, folder / "cut", *options[:1], SPIKES.format("skip"), stop_at=11)
        found["skip, cut"] = run.train(dataset, folder / "cut", *options[:1], SPIKES.format("skip"))
    with Faulty(dict.fromkeys((14, 18, 22, 26), 30.0)) as run:
        found["roll back, again and again"] = run.train(dataset, folder / "again", *options)
    return found


def a_bit_that_flipped(dataset: Path, folder: Path) -> dict[str, str]:
    def flip(step: int, module: torch.nn.Module) -> None:
        if step == 3:
            bits = dict(module.named_parameters())["h.1.ln_1.bias"].detach().view(torch.int32)
            bits[7] ^= 1 << 20  # of the mantissa: the lowest ones may be rounded away by the next update

    found = {}
    for stage in range(4):
        with Faulty(act=flip) as run:
            options = [f"zero_optimization.stage={stage}", "megagpt.guards.compare_every=3", "megagpt.every.log=1"]
            found[f"stage {stage}"] = run.train(dataset, folder / f"{stage}", *options)["message"]
    with Faulty(act=flip) as run:  # at stage 0 it stays, and is found later too
        options = ["zero_optimization.stage=0", "megagpt.guards.compare_every=5"]
        found["later"] = run.train(dataset, folder / "later", *options)["message"]
    return found


def memory_that_grows(dataset: Path, folder: Path) -> list[str]:
    kept = []
    window, guards.WINDOW = guards.WINDOW, 2
    with Faulty(act=lambda step, module: kept.append(torch.ones(2**22))) as run:  # 16 MiB
        said = run.train(dataset, folder / "run", "megagpt.every.log=1", "megagpt.guards.memory_growth_mib=20")["said"]
    guards.WINDOW = window
    return [line for line in said if "memory of rank" in line]


SCENARIOS = [
    one_step_that_is_not_finite,
    three_steps_in_a_row_that_are_not_finite,
    a_spike,
    a_bit_that_flipped,
    memory_that_grows,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
