"""Measure what DeepSpeed's stages 1 and 2 do on the host in a pass, on a process group that sends nothing.

usage: zero12_loops.py STAGE RANKS TENSORS

Prints the seconds of reducing the gradients of a backward pass, and of an update. Each rank keeps a part of the flat
gradients, so a pass cuts them into at least as many slices as there are ranks, and begins and copies each with Python.
The seconds for each tensor and for each rank are TENSOR_LOOP and SLICE_LOOP of megagpt/planner/step_time.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ELEMENTS = 8  # of each rank's part of a tensor
TRIES = 3


def least_seconds(call: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Return the processor time of the fastest of some calls."""
    found = []
    for _ in range(TRIES):
        prepare()
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


class Sum(torch.nn.Module):
    """A model of vectors whose backward pass computes nothing but their gradients."""

    def __init__(self, tensors: int, size: int) -> None:
        super().__init__()
        self.vectors = torch.nn.ParameterList(torch.zeros(size) for _ in range(tensors))

    def forward(self) -> torch.Tensor:
        """Return the sum of all elements."""
        return torch.stack([vector.sum() for vector in self.vectors]).sum()


def main(stage: int, ranks: int, tensors: int) -> None:
    """Print what a pass and an update take."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    size = ELEMENTS * ranks
    model = Sum(tensors, size)
    config = {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": max(size, size * tensors // 8)},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    losses: list[torch.Tensor] = []
    backward = least_seconds(lambda: engine.backward(losses[-1]), lambda: losses.append(engine()))
    alone = Sum(tensors, size)
    plain = least_seconds(lambda: losses[-1].backward(), lambda: losses.append(alone()))
    update = least_seconds(engine.step, lambda: engine.backward(engine()))
    sys.stdout.write(json.dumps({"reduce": round(backward - plain, 4), "update": round(update, 4)}) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
