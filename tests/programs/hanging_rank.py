"""One rank of a run whose first evaluation is slow, and in which rank 1 never comes out of its fifth step."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import debug_run

from megagpt.distributed.process_group import init_process_group, rank
from megagpt.train import trainer, validation

how, dataset, out_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
DEVICE = init_process_group()
apart = dist.new_group(backend="gloo")
HANGS = {
    "waits": lambda: threading.Event().wait(),
    "reduces what no other rank does": lambda: dist.all_reduce(torch.zeros(1), group=apart),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
train_step, evaluate, taken = trainer.train_step, validation.evaluate, 0


def hanging(*args: Any) -> Any:
    global taken
    taken += 1
    if rank() == 1 and taken == 5:
        HANGS[how]()
    return train_step(*args)


def slow(*args: Any, **kw: Any) -> Any:
    threading.Event().wait(5.0)
    return evaluate(*args, **kw)


trainer.train_step, validation.evaluate = hanging, slow
trainer.train(debug_run(dataset, out_dir, "megagpt.guards.hang_timeout=2", "megagpt.every.eval=3"), DEVICE)
