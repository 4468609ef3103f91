"""The baseline: DeepSpeed used as its documentation shows, `save_checkpoint` and `load_checkpoint` with `latest`.

A small network learns to copy; batches are a function of the step, which travels in `client_state`. No dropout, so
that a resume can be exact without the random generators that DeepSpeed does not save.
"""

import json
from pathlib import Path

import deepspeed
import torch
from torch import nn


def train(folder: Path, stage: int, steps: int, every: int = 2) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs for a minute
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    _, client_state = engine.load_checkpoint(str(folder))
    step = client_state["step"] if client_state else 0
    rank = torch.distributed.get_rank()
    if rank == 0:
        print(f"starting at step {step}", flush=True)
    while step < steps:
        tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))[2 * rank : 2 * rank + 2]
        loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        step += 1
        if rank == 0:
            print(f"step {step}/{steps} | loss {loss.item()}", flush=True)
            with (folder.parent / f"{folder.name}.losses").open("a") as file:
                file.write(json.dumps([step, loss.item()]) + "\n")
        if step % every == 0:
            engine.save_checkpoint(str(folder), client_state={"step": step})
    return 0
