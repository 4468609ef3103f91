"""One contestant of throughput.py, in a process of its own that takes steps when it is told to.

Its one argument is a Spec as JSON. Each line of standard input is a number of steps to take, and each line written to
the file descriptor spec.answers is JSON: once that it is ready, then what each turn took. It ends when its input does.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from plain_peers import gpt2, plain
from turns import Spec, Turns, run_of

from megagpt.data.dataset import Dataset
from megagpt.distributed.process_group import init_process_group
from megagpt.train import trainer


def ours(spec: Spec, turns: Turns, device: torch.device) -> None:
    """`trainer.train` on a run file, its training step interrupted between turns."""
    take_step, last = trainer.train_step, None

    def step(*args: Any) -> Any:
        nonlocal last
        turns.wait(last)
        result = take_step(*args)
        last = result[0]
        return result

    trainer.train_step = step
    trainer.train(run_of(spec), device, fresh=True)


def ours_one_file(spec: Spec, turns: Turns, device: torch.device) -> None:
    """`ours` on a dataset whose shards are all one and the same file, which says of itself that it is the first."""
    header = Dataset.header
    Dataset.header = lambda self, split, variant, shard: header(self, split, variant, 0)
    ours(spec, turns, device)


def matmul(spec: Spec, turns: Turns, device: torch.device) -> None:
    """What the hardware multiplies per second: the MLP's first layer at this micro-batch; on a GPU 8192 cubed too."""
    C, tokens = spec.model["n_embd"], spec.micro_batch * spec.model["seq_len"]
    shapes = [(tokens, C, 4 * C), *([(8192, 8192, 8192)] if spec.device == "cuda" else [])]
    rates: dict[str, float] = {}
    clocks = ""
    while True:
        turns.answer(None, flops_per_sec=rates, clocks=clocks)
        if not sys.stdin.readline():
            return
        rates, turns.began = {}, time.perf_counter()
        for m, k, n in shapes:
            a, b = (torch.randn(rows, k, device=device).to(spec.torch_dtype) for rows in (m, n))
            times = []
            for _ in range(12):
                began = time.perf_counter()
                F.linear(a, b)
                if spec.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            rates[f"{m}x{k}x{n}"] = 2 * m * k * n / sorted(times)[3]
        clocks = gpu_facts() if spec.device == "cuda" else ""


def gpu_facts() -> str:
    """Name, driver, clocks, power and temperature while the GPU is still warm from the multiplications."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def hugging_face(function: str, spec: Spec, turns: Turns, device: torch.device, **options: bool) -> None:
    getattr(import_module("hf_peers"), function)(spec, turns, device, **options)  # the others need no transformers


PEERS: dict[str, Callable[[Spec, Turns, torch.device], None]] = {
    "ours": ours,
    "ours-one-file": ours_one_file,
    "plain": plain,
    "ddp": partial(plain, ddp=True),
    "gpt2-fp32": partial(gpt2, fp32=True),
    "gpt2": gpt2,
    "gpt2-compile": partial(gpt2, compiled=True),
    "hf": partial(hugging_face, "hf"),
    "hf-compile": partial(hugging_face, "hf", compiled=True),
    "hf-trainer": partial(hugging_face, "hf_trainer"),
    "hf-trainer-compile": partial(hugging_face, "hf_trainer", compiled=True),
    "matmul": matmul,
}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    device = init_process_group()
    assert device.type == spec.device, f"asked for {spec.device}, and this machine gives {device}"
    torch.set_float32_matmul_precision("high")
    PEERS[spec.peer](spec, Turns(spec.answers, device, began), device)


if __name__ == "__main__":
    main()
