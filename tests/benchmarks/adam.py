"""Adam's step alone, on all parameters of a model at once: torch's fused kernel (ours) against its alternatives.

    python tests/benchmarks/adam.py --model 124M                     on a CPU, whose FusedAdam DeepSpeed compiles
    python tests/benchmarks/adam.py --model 124M --device cuda

All step the same gradients from the same weights, in turns in one process; ratios are taken within a round, and the
weights are compared at the end. As under ZeRO-1 on one rank: one flat fp32 tensor of what decays, one of what does not.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from throughput_table import SIZES, commit, hardware
from torch import Tensor
from torch.optim import AdamW, Optimizer

from megagpt.config.model import ModelConfig
from megagpt.model.flops import n_params
from megagpt.tokenizer.tokenizer import padded_vocab_size

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "torch fused (ours)": lambda groups, **given: AdamW(groups, fused=True, **given),
    "torch foreach": lambda groups, **given: AdamW(groups, foreach=True, **given),
    "DeepSpeed FusedAdam": lambda groups, **given: FusedAdam(groups, adam_w_mode=True, **given),
    "DeepSpeedCPUAdam": lambda groups, **given: DeepSpeedCPUAdam(groups, adamw_mode=True, **given),  # on a CPU alone
}


def groups_of(sizes: list[int], device: torch.device) -> list[dict[str, Any]]:
    """The same weights and gradients every time; the second group does not decay."""
    generator = torch.Generator(device).manual_seed(0)
    groups: list[dict[str, Any]] = []
    for size, weight_decay in zip(sizes, (0.1, 0.0), strict=True):
        weights = torch.randn(size, generator=generator, device=device).mul_(0.02).requires_grad_()
        weights.grad = torch.randn(size, generator=generator, device=device).mul_(1e-3)
        groups.append({"params": [weights], "weight_decay": weight_decay})
    return groups


def seconds(optimizer: Optimizer, steps: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def weights_of(optimizer: Optimizer) -> Tensor:
    return torch.cat([weights.detach() for group in optimizer.param_groups for weights in group["params"]])


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    device = torch.device(args.device)
    n_layer, n_head, n_embd = SIZES[args.model]
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, seq_len=1024)
    vectors = (13 * n_layer + 2) * n_embd
    sizes = [n_params(cfg, padded_vocab_size(50_257)) - vectors, vectors]
    made: dict[str, Optimizer] = {}
    failed: dict[str, str] = {}
    for name, make in OPTIMIZERS.items():
        if name == "DeepSpeedCPUAdam" and args.device == "cuda":
            continue
        try:
            made[name] = make(groups_of(sizes, device), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
            seconds(made[name], 1, device)  # makes the moments
        except Exception as error:  # DeepSpeed's want a compiler, which need not be there
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            made.pop(name, None)
    rounds = [{name: seconds(one, args.steps, device) for name, one in made.items()} for _ in range(args.rounds)]
    ours, *_ = made
    expected = weights_of(made[ours])
    rows: dict[str, dict[str, Any]] = {name: {"failed": reason} for name, reason in failed.items()}
    for name, optimizer in made.items():
        ratios = [took[name] / took[ours] for took in rounds]
        rows[name] = {
            "ms_per_step": 1e3 * statistics.median(took[name] for took in rounds),
            "over_ours": [statistics.median(ratios), min(ratios), max(ratios)],
            "largest_difference": (weights_of(optimizer) - expected).abs().max().item(),
        }
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| optimizer | ms per step | over ours (min to max) | largest difference of a weight |",
        "|---|---|---|---|",
    ]
    for name, row in report["optimizers"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed'][:120]} | - | - |")
            continue
        median, low, high = row["over_ours"]
        lines.append(
            f"| {name} | {row['ms_per_step']:.1f} | {median:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['largest_difference']:.1e} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    setting = {key: value for key, value in vars(args).items() if key != "json"}
    report = {"date": date.today().isoformat(), "commit": commit(), "setting": setting}
    report |= {"hardware": hardware(args.device), "versions": {name: version(name) for name in ("torch", "deepspeed")}}
    report["optimizers"] = measure(args)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
