"""Peers of learning.py: a GPT-2 in a plain PyTorch loop, and Hugging Face's Trainer, on the rows of our sampler.

python tests/benchmarks/learning_peers.py loop RUN.json [key=value ...]

Writes metrics.jsonl into the run file's folder: the validation loss and the median seconds of steps, by our names.
Both begin with our initial weights, GPT-2's. Neither imports DeepSpeed.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plain_gpt2 import PlainGPT2
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.data.dataset import open_dataset
from megagpt.data.loader import ValWindows
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import padded_vocab_size


class Peer:
    """The data of a run file, its first weights, and the record of a peer's losses and times."""

    def __init__(self, run: RunConfig) -> None:
        self.run, self.cfg = run, run.megagpt
        self.steps, self.batch, self.seq_len = (
            self.cfg.schedule.max_steps,
            run.deepspeed.train_batch_size or 0,
            self.cfg.model.seq_len,
        )
        self.samples = open_samples(self.cfg, self.batch, None)
        dataset = open_dataset(next(iter(self.cfg.data.val.values())).path)
        windows = ValWindows(dataset.stream("val"), self.seq_len, self.cfg.data.val_tokens)
        self.val = torch.empty(len(windows), self.seq_len + 1, dtype=torch.int64)
        windows.fill(0, self.val.numpy())
        self.vocab_size = padded_vocab_size(dataset.tokenizer().vocab_size)
        torch.manual_seed(self.cfg.seed)
        self.weights = GPT(self.cfg.model, self.vocab_size).state_dict()
        self.rows: list[dict[str, float]] = []
        self.times: list[float] = []

    def row(self, sample: int, n: int) -> Tensor:
        """Return n samples from `sample` on, (n, T + 1)."""
        rows = torch.empty(n, self.seq_len + 1, dtype=torch.int64)
        self.samples.fill(sample, rows.numpy())
        return rows

    def lr(self, step: int) -> float:
        """Return nanoGPT's rate of update `step` (0-based): linear warm-up, then half a cosine to a tenth."""
        schedule, peak = self.cfg.schedule, self.run.deepspeed.optimizer.params.lr
        if step < schedule.warmup_steps:
            return peak * (step + 1) / schedule.warmup_steps
        progress = (step - schedule.warmup_steps) / max(1, self.steps - 1 - schedule.warmup_steps)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    def after_step(self, step: int, loss_of: Any) -> None:
        """Record what `megagpt train` logs at this step."""
        if step % self.cfg.every.log == 0:
            self.rows.append({"step": step, "perf/seconds_per_step": statistics.median(self.times)})
            self.times.clear()
        if step % self.cfg.every.eval == 0 or step == self.steps:
            with torch.no_grad():
                losses = [loss_of(part[:, :-1], part[:, 1:]).item() * len(part) for part in self.val.split(self.batch)]
            self.rows.append({"step": step, "val/loss": sum(losses) / len(self.val)})

    def write(self) -> None:
        """Write the record into the run file's folder."""
        self.cfg.out_dir.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in self.rows]
        Path(self.cfg.out_dir, "metrics.jsonl").write_text("".join(lines))


def loop(peer: Peer) -> None:
    """Train with what one writes by hand: forward, backward, clip, step."""
    model = PlainGPT2(peer.cfg.model, peer.vocab_size)
    model.load_state_dict(peer.weights)
    params = peer.run.deepspeed.optimizer.params
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps, fused=True)
    for step in range(peer.steps):
        began = time.perf_counter()
        rows = peer.row(step * peer.batch, peer.batch)
        for group in optimizer.param_groups:
            group["lr"] = peer.lr(step)
        model(rows[:, :-1], rows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), peer.run.deepspeed.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peer.times.append(time.perf_counter() - began)
        peer.after_step(step + 1, model)


def trainer(peer: Peer) -> None:
    """Train with Hugging Face's Trainer at the same settings."""
    sizes = {key: getattr(peer.cfg.model, key) for key in ("n_layer", "n_head", "n_embd")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    cfg = GPT2Config(vocab_size=peer.vocab_size, n_positions=peer.seq_len, use_cache=False, **sizes, **no_dropout)
    model = GPT2LMHeadModel(cfg)
    transposed = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # its layers are Conv1D, (in, out)
    for name, weight in peer.weights.items():
        theirs = model.get_parameter(name if name.startswith("lm_head") else f"transformer.{name}")
        theirs.data.copy_(weight.T if name.endswith(transposed) else weight)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=x, labels=y, shift_labels=y.contiguous()).loss
        return loss

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return peer.steps * peer.batch

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            row = peer.row(i, 1)[0]
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class Record(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            peer.times.append(time.perf_counter() - self.began)  # from the end of the step before: with its data
            model.eval()
            peer.after_step(state.global_step, loss_of)
            model.train()
            self.began = time.perf_counter()

    params = peer.run.deepspeed.optimizer.params
    args = TrainingArguments(
        output_dir=str(peer.cfg.out_dir),
        per_device_train_batch_size=peer.batch,
        max_steps=peer.steps,
        learning_rate=params.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=peer.cfg.schedule.warmup_steps,
        weight_decay=params.weight_decay,
        adam_beta1=params.betas[0],
        adam_beta2=params.betas[1],
        adam_epsilon=params.eps,
        max_grad_norm=peer.run.deepspeed.gradient_clipping,
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[Record()]).train()


def main() -> None:
    kind, run_file, *options = sys.argv[1:]
    peer = Peer(load_run_config(Path(run_file), options))
    {"loop": loop, "trainer": trainer}[kind](peer)
    peer.write()


if __name__ == "__main__":
    main()
