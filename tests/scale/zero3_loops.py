"""Measure DeepSpeed's two loops of ZeRO-3 over tensors and ranks, on a process group that sends nothing.

usage: zero3_loops.py RANKS TENSORS

Prints the microseconds for each tensor and rank, which megagpt/planner/step_time.py has as GATHER_LOOP and
SCATTER_LOOP. On a GPU a gather also records a stream for each tensor, which is not measured.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ELEMENTS = 8  # of each rank's part
TRIES = 5


def least_seconds(call: Callable[[], object]) -> float:
    """Return the processor time of the fastest of some calls."""
    found = []
    for _ in range(TRIES):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def gather(ranks: int, tensors: int) -> None:
    """Do what DeepSpeed does after a gather of these tensors: put each together from all ranks' parts."""
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    size = ranks * ELEMENTS
    params = [
        SimpleNamespace(
            ds_status=ZeroParamStatus.INFLIGHT,
            ds_numel=size,
            ds_shape=(size,),
            ds_tensor=SimpleNamespace(ds_numel=ELEMENTS, dtype=torch.float32),
            ds_summary=lambda: "",
        )
        for _ in range(tensors)
    ]
    flat = torch.empty(size * tensors)
    parts = [flat.narrow(0, i * ELEMENTS * tensors, ELEMENTS * tensors) for i in range(ranks)]
    AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), params, parts, ranks).wait()


def main(ranks: int, tensors: int) -> None:
    """Print what both loops take for each tensor and rank."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    import deepspeed
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    deepspeed.init_distributed(verbose=False)
    gradients = [torch.zeros(ranks * ELEMENTS) for _ in range(tensors)]
    seconds = {
        "gather": least_seconds(lambda: gather(ranks, tensors)),
        "reduce_scatter": least_seconds(lambda: reduce_scatter_coalesced(gradients)),
    }
    print(json.dumps({name: round(1e6 * taken / ranks / tensors, 2) for name, taken in seconds.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
