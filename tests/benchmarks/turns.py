"""What the contestants of throughput.py share: their setting, and the clock that interrupts them between turns."""

import ctypes
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megagpt.config.model import ModelConfig
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.distributed.process_group import rank, world_size
from megagpt.guards.memory_growth import peak_memory
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import padded_vocab_size

RUN_FILE = Path(__file__).parents[2] / "ds_configs" / "gpt2_124m.json"
SEED, LR, BETAS, WEIGHT_DECAY, CLIP = 1234, 3e-4, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Spec:
    peer: str
    overrides: list[str]  # of the run file, for `ours`
    folder: str  # of the data; this contestant's own files go to folder/name
    name: str
    model: dict[str, int]
    vocab_size: int  # of the tokenizer
    micro_batch: int
    global_batch: int
    turn: int  # steps
    dtype: str  # bf16, fp32 or auto
    device: str
    answers: int = -1

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class Turns:
    """The clock of this contestant: `wait` stands between two of its steps."""

    def __init__(self, answers: int, device: torch.device, began: float) -> None:
        self.device, self.left, self.taken, self.began, self.cpu_began = device, 0, 0, began, 0.0
        self.answers = os.fdopen(answers, "w")

    def wait(self, loss: Tensor | None) -> None:
        """Before a step, with the loss of the one before: at the end of a turn, answer and wait for the next."""
        if self.left == 0:
            self.answer(loss)
            self.left = self.taken = int(sys.stdin.readline() or sys.exit())
            self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.left -= 1

    def answer(self, loss: Tensor | None, **more: Any) -> None:
        last = None if loss is None else loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        row = {
            "steps": self.taken,
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds": time.process_time() - self.cpu_began,
            "loss": last,
            "memory_gib": peak_memory(self.device) / 2**30,
            "resident_mib": resident_memory(),
            "live_mib": live_memory(),
            **more,
        }
        print(json.dumps(row), file=self.answers, flush=True)


def resident_memory() -> float:
    """MiB of this process's own that are in memory now, without mapped files; 0 where there is no /proc."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Mallinfo2(ctypes.Structure):
    """glibc's own account of its heap, in bytes: see mallinfo(3)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def live_memory() -> float:
    """MiB that are allocated and not freed, in the heap's arenas and mapped by malloc; 0 where libc is another."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0.0
    mallinfo2.restype = Mallinfo2
    heap = mallinfo2()
    return (heap.uordblks + heap.hblkhd) / 2**20


def run_of(spec: Spec) -> RunConfig:
    """The run file that a user would write for this setting."""
    folder = Path(spec.folder)
    overrides = [
        f"train_batch_size={spec.global_batch}",
        f"train_micro_batch_size_per_gpu={spec.micro_batch}",
        f"gradient_clipping={CLIP}",
        f"bf16.enabled={json.dumps(spec.dtype == 'bf16')}",
        f"optimizer.params.lr={LR}",
        f"optimizer.params.betas={json.dumps(BETAS)}",
        f"optimizer.params.weight_decay={WEIGHT_DECAY}",
        f"megagpt.seed={SEED}",
        f"megagpt.out_dir={folder / spec.name}",
        f"megagpt.model={json.dumps(spec.model)}",
        f'megagpt.data={{"train": [{{"path": "{folder / "train"}"}}], "val": "{folder / "val"}"}}',
        'megagpt.schedule={"max_steps": 1000000, "shape": "constant"}',
        f'megagpt.every={{"log": {spec.turn}, "eval": 0, "save": 0}}',
        *spec.overrides,
    ]
    return load_run_config(RUN_FILE, overrides)


def my_rows(spec: Spec, step: int) -> Tensor:
    """This rank's (rows, T + 1) of a step's global batch."""
    steps = np.load(Path(spec.folder) / "rows.npy", mmap_mode="r")
    share = spec.global_batch // world_size()
    rows = torch.from_numpy(steps[step % len(steps), rank() * share : (rank() + 1) * share].astype(np.int64))
    return rows.pin_memory() if spec.device == "cuda" else rows


def our_model(spec: Spec) -> GPT:
    torch.manual_seed(SEED)
    return GPT(ModelConfig(**spec.model), padded_vocab_size(spec.vocab_size))
