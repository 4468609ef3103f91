"""Training speed against other trainers on the same machine: same tokens, same initial weights, same torch.

    python tests/benchmarks/throughput.py --device cpu --model 124M --seq 256 --micro-batch 4 --tokens-per-step 8192
    python tests/benchmarks/throughput.py --device cuda --model 124M --seq 1024 --micro-batch 64

Each contestant is a process of its own; they take turns, A B C A B C, and wait between them, so that what else happens
on the machine strikes all alike. Ratios are taken within a round. A contestant is a name, for `ours` with overrides of
the run file behind it ("ours zero_optimization.stage=2"):

    ours                  trainer.train on ds_configs/gpt2_124m.json with the sizes given here
    plain, ddp            our model and loss in a plain PyTorch loop (in DistributedDataParallel): DeepSpeed's cost
    gpt2-fp32             a plain GPT-2 in fp32 with the foreach AdamW, as nanoGPT runs on a CPU
    gpt2, gpt2-compile    the same model with bf16 autocast and fused AdamW, as nanoGPT runs on a GPU
    hf, hf-compile        Hugging Face GPT2LMHeadModel in a bare loop with autocast
    hf-trainer[-compile]  the same in its Trainer

The fraction of the matmul rate is model FLOPs (full formula) over what F.linear reaches in the same round.
"""

import argparse
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import write_zipf
from contestants import PEERS
from throughput_table import SIZES, commit, hardware, summary, table
from turns import Spec, run_of

from megagpt.engine.precision import multiplies_bf16
from megagpt.train.preflight import prepare

HERE = Path(__file__).parent
DEFAULT_PEERS = {
    "cpu": ["ours", "plain", "gpt2-fp32", "hf"],
    "cuda": ["ours", "plain", "gpt2-compile", "hf", "hf-compile", "hf-trainer", "hf-trainer-compile"],
}
OURS = ("ours", "ours-one-file", "plain", "ddp", "matmul")  # with large pages, which megagpt asks torch for


class Contestant:
    """A process, or one for each rank, that takes a turn when asked to."""

    def __init__(self, spec: Spec, ranks: int, warmup: int) -> None:
        """Starts it and lets it take `warmup` steps, the first of which ends the clock on its start."""
        began = time.perf_counter()
        self.log = Path(spec.folder) / f"{spec.name}.log"
        self.answers, self.processes = [], []
        port = str(_free_port())
        for rank in range(ranks):
            read, write = os.pipe()
            command = [sys.executable, str(HERE / "contestants.py"), json.dumps(asdict(replace(spec, answers=write)))]
            env = dict(os.environ)
            if spec.peer not in OURS:
                env |= {"THP_MEM_ALLOC_ENABLE": "0"}  # importing megagpt would give it to all; they run as torch comes
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with self.log.open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write,), env=env, text=True
                    )
                )
            os.close(write)
            self.answers.append(os.fdopen(read))
        try:
            self._answer()
            self.take(1)
            self.start_seconds = time.perf_counter() - began
            if warmup > 1:
                self.take(warmup - 1)
        except BaseException:  # nobody has it yet who could end it
            self.end()
            raise

    def take(self, steps: int) -> dict[str, Any]:
        """Rank 0's answer, when all ranks have answered. Raises RuntimeError if one has died."""
        for process in self.processes:
            with suppress(BrokenPipeError):  # then there is no answer either
                print(steps, file=process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """Rank 0's line, when all ranks have written one; a dead rank is noticed although others wait for it."""
        waiting, lines = list(self.answers), {}
        while waiting:
            for answer in select.select(waiting, [], [])[0]:
                lines[answer] = answer.readline()
                waiting.remove(answer)
                if not lines[answer]:
                    said = self.log.read_text(errors="replace").strip().splitlines()
                    raise RuntimeError(said[-1] if said else "died without a word")
        return json.loads(lines[self.answers[0]])

    def end(self) -> None:
        for process in self.processes:
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # in the middle of a turn
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, list[dict[str, Any]] | str]]:
    """After each round, name -> the answers of its turns so far, or why it has none; "matmul" is among them."""
    specs = {name: spec_of(name, args, folder) for name in [*args.peers, "matmul"]}
    total = args.warmup + args.steps * (1 if args.fresh else args.rounds)
    write_zipf(folder, max(2**17, min(2**23, (total + 1) * args.tokens_per_step)), args.vocab_size)
    write_rows(folder / "rows.npy", specs["matmul"], total)
    results: dict[str, list[dict[str, Any]] | str] = {name: [] for name in specs}
    with ExitStack() as stack:
        kept: dict[str, Contestant] = {}
        for number in range(args.rounds):
            for name, spec in specs.items():
                if isinstance(turns := results[name], str):
                    continue
                try:
                    if name not in kept:
                        kept[name] = Contestant(spec, 1 if name == "matmul" else args.ranks, args.warmup)
                        stack.callback(kept[name].end)
                    turns.append({**kept[name].take(args.steps), "start_seconds": kept[name].start_seconds})
                    say(f"round {number + 1}/{args.rounds} {name}: {turns[-1]['seconds']:.1f} s")
                except RuntimeError as error:
                    results[name] = f"failed: {error}"
                if args.fresh and name in kept:
                    kept.pop(name).end()
            yield results


def spec_of(name: str, args: argparse.Namespace, folder: Path) -> Spec:
    peer, *overrides = name.split()
    n_layer, n_head, n_embd = SIZES[args.model]
    return Spec(
        peer=peer,
        overrides=overrides,
        folder=str(folder),
        name=re.sub(r"[^\w.=-]+", "-", name),
        model={"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "seq_len": args.seq},
        vocab_size=args.vocab_size,
        micro_batch=args.micro_batch,
        global_batch=args.tokens_per_step // args.seq,
        turn=args.steps,
        dtype=args.dtype,
        device=args.device,
    )


def write_rows(path: Path, spec: Spec, steps: int) -> None:
    """(steps, global batch, T + 1) of the samples that our sampler draws, for the peers."""
    fill = prepare(run_of(spec), torch.device(spec.device), fresh=False).training_set.fill
    rows = np.empty((spec.global_batch, spec.model["seq_len"] + 1), dtype=np.int64)
    out = np.empty((steps, *rows.shape), dtype=np.uint16)
    for step in range(steps):
        fill(step * spec.global_batch, rows)
        out[step] = rows
    np.save(path, out)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """For argparse, which says what it got."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--vocab-size", type=positive, default=50_257)
    parser.add_argument("--seq", type=positive, default=1024, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=positive, default=64, help="sequences per forward pass")
    parser.add_argument("--tokens-per-step", type=positive, default=524_288, help="over all micro-batches and ranks")
    parser.add_argument("--steps", type=positive, default=5, help="in a turn")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--warmup", type=positive, default=3, help="steps that are not timed, at least 1")
    parser.add_argument("--peers", nargs="+", help="the first is the reference; default: all that the device can run")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")
    parser.add_argument("--ranks", type=positive, default=1, help="processes of each contestant; GPUs")
    parser.add_argument("--fresh", action="store_true", help="a new process for each turn: models too large to wait")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, help="for the temporary files; default: the system's")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, and torch sees no GPU here; try --device cpu")
    args.peers = args.peers or [*DEFAULT_PEERS[args.device], *(["ddp"] if args.ranks > 1 else [])]
    if unknown := [name for name in args.peers if name.split()[0] not in PEERS]:
        parser.error(f"no contestant {unknown[0]!r}; there are {', '.join(PEERS)}")
    per_pass = args.micro_batch * args.seq * args.ranks
    if args.tokens_per_step % per_pass:
        parser.error(f"--tokens-per-step {args.tokens_per_step} is no multiple of {per_pass} tokens in a pass")
    if args.dtype == "auto":
        fast = args.device == "cuda" or multiplies_bf16()
        args.dtype = "bf16" if fast else "fp32"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    setting = {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "setting": setting,
        "threads": torch.get_num_threads(),
        "hardware": hardware(args.device),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers") if find_spec(name)},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for results in measure(args, Path(folder)):
            report |= summary(setting, results)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
