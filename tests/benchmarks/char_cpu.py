"""What DeepSpeed and our loop cost: ds_configs/char_cpu.json through `trainer.train`, against a plain PyTorch loop.

Both run in one process, in turns of --turn steps, over the same model, data, order, optimizer and schedule, and log
every 10 steps. The plain loop is what one writes by hand: forward, backward, clip, step, and every 10 steps the mean
loss. Prints steps per second of both in every turn, their ratio, and how far the losses are apart; writes JSON beside.
"""

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.distributed.process_group import init_process_group
from megagpt.engine.optimizer import decay_groups
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss
from megagpt.train import trainer
from megagpt.train.lr_schedule import lr_factor
from megagpt.train.session import Session

ROOT = Path(__file__).parents[2]


class PlainLoop:
    """A dozen lines of PyTorch: the peer."""

    def __init__(self, run: RunConfig, session: Session) -> None:
        self.cfg, self.optimizer_cfg = run.megagpt, run.deepspeed.optimizer.params
        self.clip, self.data, self.batch = (
            run.deepspeed.gradient_clipping,
            session.setup.training_set,
            session.setup.batch,
        )
        torch.manual_seed(self.cfg.seed)
        self.model = GPT(self.cfg.model, session.setup.data.vocab_size)
        p = self.optimizer_cfg
        groups = decay_groups(self.model, p.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=p.lr, betas=p.betas, eps=p.eps, fused=True)
        self.step = 0
        self.recent: list[Tensor] = []
        self.losses: dict[int, float] = {}  # mean of the last 10, at every 10th step

    def take(self, n_steps: int) -> None:
        B, T = self.batch.global_batch, self.cfg.model.seq_len
        for _ in range(n_steps):
            rows = torch.empty(B, T + 1, dtype=torch.int64)
            self.data.fill(self.step * B, rows.numpy())
            for group in self.optimizer.param_groups:
                group["lr"] = self.optimizer_cfg.lr * lr_factor(self.step, self.cfg.schedule)
            loss = next_token_loss(self.model(rows[:, :-1]), rows[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.recent.append(loss.detach())
            if self.step % 10 == 0:
                self.losses[self.step] = torch.stack(self.recent).mean().item()
                self.recent = []


def interleave(
    run: RunConfig, turns: int, turn: int, device: torch.device
) -> tuple[list[float], list[float], PlainLoop]:
    """(our steps/s, plain steps/s, the plain loop): before every turn of ours the plain loop takes its own.

    The run has one step more than all turns, whose beginning ends the clock on the last one.
    """
    take_step = trainer.train_step
    ours, plain = [], []
    loops: list[PlainLoop] = []
    taken, began = 0, 0.0

    def step(session: Session, batches: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor | float | None, Tensor]:
        nonlocal taken, began
        if taken % turn == 0:
            now = time.perf_counter()
            if taken == 0:
                loops.append(PlainLoop(run, session))
            else:
                ours.append(turn / (now - began))
            if taken < turns * turn:
                now = time.perf_counter()
                loops[0].take(turn)
                began = time.perf_counter()
                plain.append(turn / (began - now))
        taken += 1
        return take_step(session, batches)

    trainer.train_step = step
    try:
        trainer.train(run, device)
    finally:
        trainer.train_step = take_step
    return ours, plain, loops[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--turn", type=int, default=100, help="steps")
    parser.add_argument("--stage", type=int, default=None, help="ZeRO stage instead of the run file's")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    device = init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        corpus, out_dir = Path(folder, "char"), Path(folder, "run")
        stdlib = Path(sysconfig.get_path("stdlib"))
        texts = [stdlib / name for name in ("argparse.py", "doctest.py", "inspect.py", "pydoc.py", "typing.py")]
        build(texts, corpus, BuildConfig(tokenizer_type="char", vocab_size=512, val_fraction=0.1, split_text_at="\n\n"))
        overrides = [
            *(f"megagpt.data.{key}={corpus}" for key in ("train.0.path", "val")),
            f"megagpt.out_dir={out_dir}",
            f"megagpt.schedule.max_steps={args.turns * args.turn + 1}",
            'megagpt.every={"log": 10, "eval": 0, "save": 0}',
            "tensorboard.enabled=true",
            *([] if args.stage is None else [f"zero_optimization.stage={args.stage}"]),
        ]
        run = load_run_config(ROOT / "ds_configs" / "char_cpu.json", overrides)
        ours, plain, loop = interleave(run, args.turns, args.turn, device)
        logged = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]

    losses = {row["step"]: row["train/loss"] for row in logged if row["step"] in loop.losses}
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    figures = {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "zero_stage": run.deepspeed.zero_optimization.stage,
        "steps_per_sec_ours": ours,
        "steps_per_sec_plain": plain,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "final_loss": {"ours": losses[loop.step], "plain": loop.losses[loop.step]},
        "largest_loss_difference": max(abs(losses[step] - loss) for step, loss in loop.losses.items()),
    }
    print(json.dumps(figures, indent=1))
    print(f"ours / plain: median {figures['ratio_median']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
