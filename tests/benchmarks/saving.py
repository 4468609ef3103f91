"""What a checkpoint costs: how long training waits, until it is committed, to verify it, and to start from it again.

    python tests/benchmarks/saving.py --model 124M
    python tests/benchmarks/saving.py --model 350M --rounds 2

One rank on ds_configs/debug_cpu.json with the model's sizes, fp32, ZeRO-1, fused AdamW after a first step: 16 bytes for
each parameter are saved. In each round one save at once, one beside training (which takes steps until it is committed),
and the memcpy that it is held against: as many bytes, between memory that was touched before. Every step's folder is
removed when it was measured, so no rotation is in the figures. Files are read back from the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_data import write_zipf
from throughput_table import SIZES, commit, hardware

from megagpt.checkpoint.async_writer import Writer
from megagpt.checkpoint.commit import committed, damage_of
from megagpt.config.run_file import load_run_config
from megagpt.distributed.process_group import init_process_group
from megagpt.train.preflight import prepare
from megagpt.train.session import Session
from megagpt.train.trainer import train_step

ROOT = Path(__file__).parents[2]
DEBUG_RUN = ROOT / "ds_configs" / "debug_cpu.json"
VOCAB_SIZE = 50_257


def overrides(model: str, folder: Path) -> list[str]:
    n_layer, n_head, n_embd = SIZES[model]
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "seq_len": 128}
    return [
        f"megagpt.model={json.dumps(sizes)}",
        f"megagpt.data.train.0.path={folder / 'train'}",
        f"megagpt.data.val={folder / 'val'}",
        "megagpt.data.val_tokens=128",
        f"megagpt.out_dir={folder / 'run'}",
        "train_batch_size=1",
        "train_micro_batch_size_per_gpu=1",
        'megagpt.schedule={"max_steps": 1000}',
        'megagpt.every={"log": 1, "eval": 0, "save": 0}',
    ]


def seconds(work: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def memcpy(n_bytes: int) -> None:
    """In pieces of 1 GiB, about as large as the tensors of a state, which no cache and no TLB holds."""
    for at in range(0, n_bytes, len(SOURCE)):
        n = min(len(SOURCE), n_bytes - at)
        TARGET[:n].copy_(SOURCE[:n])


SOURCE, TARGET = torch.ones(2, 2**30, dtype=torch.uint8)  # untouched zeros would all be one page, in the cache


def measure(options: list[str], rounds: int) -> dict[str, Any]:
    """Leaves one committed step behind."""
    run = load_run_config(DEBUG_RUN, options)
    device = init_process_group()
    session = Session(prepare(run, device, fresh=False), device)
    batches, state, out_dir = session.batches(), session.setup.state, run.megagpt.out_dir
    writers = {asynchronous: Writer(asynchronous=asynchronous) for asynchronous in (False, True)}
    names = ("memcpy", "at_once", "stall", "until_committed", "verify", "step", "step_beside")
    found: dict[str, list[float]] = {name: [] for name in names}
    n_bytes = 0

    def save(*, asynchronous: bool) -> float:
        nonlocal state
        session.writer, state = writers[asynchronous], replace(state, step=state.step + 1)
        return seconds(session.save, state)

    def remove_steps() -> None:
        for step_dir in committed(out_dir):
            shutil.rmtree(step_dir)
        os.sync()  # and a training step comes next, as in training: the disk is not at work for the save before

    train_step(session, batches)
    for number in range(rounds):
        remove_steps()
        found["step"].append(seconds(train_step, session, batches))
        found["at_once"].append(save(asynchronous=False))
        [step_dir] = committed(out_dir)
        n_bytes = sum(path.stat().st_size for path in step_dir.iterdir())
        found["verify"].append(seconds(damage_of, step_dir, 0))
        remove_steps()
        found["step"].append(seconds(train_step, session, batches))
        found["memcpy"].append(statistics.median(seconds(memcpy, n_bytes) for _ in range(3)))
        began = time.perf_counter()
        found["stall"].append(save(asynchronous=True))
        while not committed(out_dir):
            found["step_beside"].append(seconds(train_step, session, batches))
        found["until_committed"].append(time.perf_counter() - began)
        session.writer.wait()
        print(f"round {number + 1}: " + ", ".join(f"{name} {took[-1]:.2f} s" for name, took in found.items()))
    return {"bytes": n_bytes, "seconds": found}


def start_again(options: list[str]) -> float:
    """From the command to the end of the first step; the checkpoint is verified and loaded on the way."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed_config", str(DEBUG_RUN), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout is not None
    going_on = False
    for line in process.stdout:
        going_on = going_on or line.startswith("resuming from")
        if line.startswith("step"):
            break
    took = time.perf_counter() - began
    process.kill()
    process.wait()
    assert going_on, "it did not find the checkpoint"
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the raw figures go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saving_") as name:
        folder = Path(name)
        write_zipf(folder, 2**20, VOCAB_SIZE)
        options = overrides(args.model, folder)
        with get_context("spawn").Pool(1) as pool:  # its memory is gone before the run starts again
            found = pool.apply(measure, (options, args.rounds))
        found["seconds"]["start_again"] = [start_again(options)]
    took = {key: statistics.median(values) for key, values in found["seconds"].items()}
    # memory for the copies is new in the first round, and taken again in the others
    stalls, copies = (found["seconds"][key][1:] for key in ("stall", "memcpy"))
    took["stall_first"], took["stall"] = found["seconds"]["stall"][0], statistics.median(stalls)
    over_memcpy = statistics.median(stall / copy for stall, copy in zip(stalls, copies, strict=True))
    print(f"{args.model}, {found['bytes'] / 1e9:.2f} GB, medians of {args.rounds} rounds, seconds:")
    for key, value in took.items():
        print(f"  {key:16} {value:8.2f}")
    print(f"  stall over memcpy {over_memcpy:.2f}, over a save at once {took['stall'] / took['at_once']:.3f}")
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "model": args.model, "torch": torch.__version__}
        report = {**facts, "hardware": hardware("cpu"), **found, "medians": took, "stall_over_memcpy": over_memcpy}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
