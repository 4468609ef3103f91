"""What each choice costs: a step's time and memory against plain GPT-2's with AdamW, for any run file.

    OMP_NUM_THREADS=1 python tests/benchmarks/step_time.py                        nanoGPT's CPU setting (char_cpu.json)
    python tests/benchmarks/step_time.py --run ds_configs/gpt2_124m.json --vocab-size 50304 --only "" swiglu
    ... key.path=value                                                            changes the run file for all of them

Every choice is an engine in this one process, on random tokens; they take turns of one step, so that whatever else the
machine does falls on all of them alike. A step is forward, backward and update, as in training; its time is processor
time on a CPU (of all threads) and time by the clock on a GPU. The table has medians, their ratios to the run file's as
it is, and the memory of weights and optimizer with the most that a step allocates. (`2> /dev/null` hides a profiler's
messages.)
"""

import argparse
import gc
import json
import statistics
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from megagpt.config.batch import batch_plan
from megagpt.config.run_file import load_run_config
from megagpt.distributed.process_group import init_process_group
from megagpt.engine.build import build_engine
from megagpt.model.loss import next_token_score

CHAR_CPU = Path(__file__).parents[2] / "ds_configs" / "char_cpu.json"
AS_IT_IS = "the run file"
MUON = ["optimizer.type=Muon"]
SPEEDRUN = ["megagpt.model.preset=speedrun"]
CHOICES = {
    AS_IT_IS: [],
    "Muon": MUON,
    "sinusoidal": ["megagpt.model.position=sinusoidal"],
    "rotary": ["megagpt.model.position=rotary"],
    "alibi": ["megagpt.model.position=alibi"],
    "rmsnorm": ["megagpt.model.norm=rmsnorm"],
    "rmsnorm_unweighted": ["megagpt.model.norm=rmsnorm_unweighted"],
    "qk_norm": ["megagpt.model.qk_norm=true"],
    "n_kv_head=1": ["megagpt.model.n_kv_head=1"],
    "relu2": ["megagpt.model.mlp=relu2"],
    "swiglu": ["megagpt.model.mlp=swiglu"],
    "geglu": ["megagpt.model.mlp=geglu"],
    "no bias": ["megagpt.model.bias=false"],
    "untied": ["megagpt.model.tied=false"],
    "logit_softcap": ["megagpt.model.logit_softcap=15"],
    "value_residual": ["megagpt.model.value_residual=true"],
    "embedding_shortcut": ["megagpt.model.embedding_shortcut=true"],
    "sliding_window=16": ["megagpt.model.sliding_window=16"],
    "llama": ["megagpt.model.preset=llama"],
    "speedrun, AdamW": SPEEDRUN,
    "speedrun, Muon": [*SPEEDRUN, *MUON],
}


class Contestant:
    """One choice's engine, which takes a step at a time."""

    def __init__(self, run_file: Path, options: list[str], vocab_size: int, device: torch.device) -> None:
        # No data is read, and nothing is written.
        run = load_run_config(run_file, ["tensorboard.enabled=false", *options])
        self.batch, self.device, self.seconds = batch_plan(run.deepspeed, 1), device, list[float]()
        self.engine = build_engine(run, self.batch, vocab_size, device, compiled=device.type == "cuda")
        shape = (self.batch.micro_batch, run.megagpt.seq_len + 1)
        self.tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step(self) -> None:
        for _ in range(self.batch.accumulation):
            score = next_token_score(self.tokens[:, 1:], compiled=self.device.type == "cuda")
            self.engine.backward(self.engine(self.tokens[:, :-1], score=score))
            self.engine.step()

    def timed_step(self) -> None:
        began = self.clock()
        self.step()
        self.seconds.append(self.clock() - began)

    def clock(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self) -> int:
        """Return the bytes of weights and optimizer, and the most that a step allocates beyond them."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return kept_bytes(self.engine) + torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        sizes = [event.nbytes() for event in found if event.name() == "[memory]"]
        return kept_bytes(self.engine) + max(accumulate(sizes))


def kept_bytes(engine: Engine) -> int:
    """Return the bytes of an engine's weights and its optimizer's state, each storage once."""
    optimizer = engine.basic_optimizer
    groups = [group["params"] for group in optimizer.param_groups]
    tensors = [*engine.module.parameters(), *tree_leaves(groups), *tree_leaves(list(optimizer.state.values()))]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def table(contestants: dict[str, Contestant], memory: dict[str, int]) -> str:
    rows = ["| choice | ms per step | ratio | MiB | ratio |", "|---|---|---|---|---|"]
    medians = {name: statistics.median(one.seconds) for name, one in contestants.items()}
    for name, median in medians.items():
        ratios = median / medians[AS_IT_IS], memory[name] / memory[AS_IT_IS]
        size = memory[name] / 2**20
        rows.append(f"| {name} | {1000 * median:.1f} | {ratios[0]:.2f} | {size:.1f} | {ratios[1]:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=CHAR_CPU, metavar="RUN.json")
    parser.add_argument("--vocab-size", type=int, default=128, help="padded; 128: characters")
    parser.add_argument("--steps", type=int, default=100, help="of each choice")
    parser.add_argument("--only", nargs="*", choices=CHOICES, default=list(CHOICES), help="and the run file as it is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    device = init_process_group()
    options: dict[str, Any] = {name: CHOICES[name] for name in CHOICES if name in (AS_IT_IS, *args.only)}
    contestants = {
        name: Contestant(args.run, [*args.options, *more], args.vocab_size, device) for name, more in options.items()
    }
    for one in contestants.values():  # compiles, and allocates what stays
        one.step()
    memory = {name: one.memory() for name, one in contestants.items()}
    gc.collect()
    gc.disable()
    for _ in tqdm(range(args.steps), unit=" rounds"):
        for one in contestants.values():
            one.timed_step()
    print(table(contestants, memory))
    if args.json:
        seconds = {name: one.seconds for name, one in contestants.items()}
        args.json.write_text(json.dumps({"seconds": seconds, "memory": memory}, indent=1))


if __name__ == "__main__":
    main()
