"""The ladder of recompute policies: what each keeps of the activations, and what its second forward passes cost.

    python tests/benchmarks/recompute.py                                    124M, 1,024 tokens, eager and compiled
    python tests/benchmarks/recompute.py --model 124M --seq 1024 --micro-batch 32      on a GPU

Forward and backward of the model alone, without optimizer. Each rung has a process of its own in every round, and the
rungs take turns, so that what else happens on the machine strikes all alike; seconds are the median of a turn's steps
(on a CPU of the process's time there, as other programs may run), ratios are taken within a round. The peak is of bytes
allocated in a step beyond weights and gradients: by the allocator on a GPU, by torch's profiler on a CPU.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from throughput import say
from throughput_table import SIZES, commit, hardware

from megagpt.config.model import ModelConfig
from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.engine.compilation import compile_blocks
from megagpt.model.attention import prefer_cudnn
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_score
from megagpt.model.recompute import recompute_blocks, recompute_inside, set_memory_budget
from megagpt.tokenizer.tokenizer import padded_vocab_size

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "selective"},
    {"policy": "every_k", "k": 2},
    {"policy": "full"},
]
COMPILED_ONLY: list[dict[str, Any]] = [{"policy": "budget", "budget": 0.5}, {"policy": "budget", "budget": 0.2}]
CUDA_ONLY: list[dict[str, Any]] = [{"policy": "none", "offload": True}, {"policy": "full", "offload": True}]


def rungs(device: str) -> dict[str, tuple[RecomputeConfig, bool]]:
    """name -> policy, and whether blocks are compiled."""
    found = {}
    for compiled in (False, True):
        more = (COMPILED_ONLY if compiled else []) + (CUDA_ONLY if device == "cuda" else [])
        for keys in POLICIES + more:
            name = " ".join(str(value) for value in keys.values()).replace("True", "on the host")
            found[f"{name}, {'compiled' if compiled else 'eager'}"] = RecomputeConfig(**keys), compiled
    return found


def turn(args: argparse.Namespace, cfg: RecomputeConfig, compiled: bool, cache: str, answer: Any) -> None:
    """One rung's turn, in a process of its own: sends its peak in bytes and its seconds per step."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    n_layer, n_head, n_embd = SIZES[args.model]
    vocab_size = padded_vocab_size(50_257)
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, seq_len=args.seq), vocab_size)
    model = model.to(device, dtype).train()
    if compiled:
        set_memory_budget(cfg)
        compile_blocks(model, Path(cache), recompute_inside(cfg, NO_DROPOUT))
    prefer_cudnn(device)
    model.recompute = recompute_blocks(cfg, NO_DROPOUT, compiled=compiled)
    tokens = torch.randint(vocab_size, (args.micro_batch, args.seq + 1), device=device)

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step() -> float:
        began = clock()
        score = next_token_score(tokens[:, 1:], compiled=compiled and device.type == "cuda")
        model(tokens[:, :-1], score=score).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    step()  # compiles, and makes the gradients
    peak = peak_bytes(step, device)
    answer.send((peak, [step() for _ in range(args.steps)]))


def peak_bytes(step: Any, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(args: argparse.Namespace, cache: str) -> dict[str, list[tuple[int, list[float]]]]:
    ladder = rungs(args.device)
    taken: dict[str, list[tuple[int, list[float]]]] = {name: [] for name in ladder}
    fork = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")  # forked: torch is imported once
    for number in range(args.rounds):
        for name, (cfg, compiled) in ladder.items():
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=turn, args=(args, cfg, compiled, cache, there), daemon=True)
            process.start()
            there.close()
            try:
                taken[name].append(here.recv())
            except EOFError:
                sys.exit(f"{name} died: see above")
            process.join()
            say(f"round {number + 1}/{args.rounds} {name}: {statistics.median(taken[name][-1][1]):.2f} s")
    return taken


def summary(taken: dict[str, list[tuple[int, list[float]]]]) -> list[dict[str, Any]]:
    rows = []
    for name, turns in taken.items():
        first = taken["none, " + name.rsplit(", ", 1)[1]]
        seconds = [statistics.median(times) for _, times in turns]
        ratios = [own / statistics.median(times) for own, (_, times) in zip(seconds, first, strict=True)]
        rows.append(
            {
                "rung": name,
                "peak_mib": statistics.median(peak for peak, _ in turns) / 2**20,
                "peak_over_none": statistics.median(peak for peak, _ in turns) / statistics.median(p for p, _ in first),
                "seconds": statistics.median(seconds),
                "seconds_over_none": statistics.median(ratios),
                "seconds_over_none_of_rounds": ratios,
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| policy | peak MiB | over none | seconds | over none (rounds) |", "|---|---|---|---|---|"]
    for row in report["rungs"]:
        each = ", ".join(f"{ratio:.2f}" for ratio in row["seconds_over_none_of_rounds"])
        lines.append(
            f"| {row['rung']} | {row['peak_mib']:.0f} | {row['peak_over_none']:.2f} | {row['seconds']:.2f} "
            f"| {row['seconds_over_none']:.2f} ({each}) |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--seq", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences")
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    setting = {key: value for key, value in vars(args).items() if key != "json"}
    report = {"date": date.today().isoformat(), "commit": commit(), "setting": setting}
    report |= {"hardware": hardware(args.device), "versions": {"torch": version("torch")}}
    with tempfile.TemporaryDirectory() as cache:
        report["rungs"] = summary(measure(args, cache))
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
