"""Settings that `megagpt plan` is judged by, and the program that runs them: what lives, and what is sent.

Sizes are such that all that counts in a large model counts here: weights and their states, activations, logits.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from live_bytes import LiveBytes
from support import debug_run

from megagpt.config.batch import BatchPlan, batch_plan
from megagpt.config.run_file import RunConfig
from megagpt.distributed.process_group import init_process_group, leave, rank, world_size

VOCAB = 1024
SIZES = ["megagpt.model.n_layer=4", "megagpt.model.n_embd=256", "megagpt.model.n_head=4", "megagpt.model.seq_len=128"]
FULL, SELECTIVE = ('megagpt.recompute={"policy": "full"}', 'megagpt.recompute={"policy": "selective"}')
LLAMA = ["megagpt.model.preset=llama", "megagpt.model.n_kv_head=2"]
BF16 = "bf16.enabled=true"


def _of(stage: int, micro_batch: int, *more: str) -> list[str]:
    """Two micro-batches in a step of two ranks, one in a step of four."""
    sizes = [f"train_micro_batch_size_per_gpu={micro_batch}", f"train_batch_size={4 * micro_batch}"]
    return [f"zero_optimization.stage={stage}", *sizes, *more]


# States or activations are most of what lives. bf16 with few tokens only, since some processors emulate it.
MEMORY = {  # stage, dtype, micro-batch and recompute
    "0, fp32, 8": _of(0, 8),
    "0, bf16, 1": _of(0, 1, BF16),
    "1, fp32, 8, full": _of(1, 8, FULL),
    "1, bf16, 1": _of(1, 1, BF16),
    "2, fp32, 1": _of(2, 1),
    "2, fp32, 8, selective": _of(2, 8, SELECTIVE),
    "3, fp32, 4, selective": _of(3, 4, SELECTIVE),
    "3, bf16, 1": _of(3, 1, BF16),
    "1, fp32, 16, loss by row blocks": _of(1, 16),
    "1, fp32, 8, eager": _of(1, 8, 'megagpt.model.attention="eager"'),
    "1, bf16, 1, Muon": _of(1, 1, BF16, "optimizer.type=Muon"),
    "3, fp32, 1, Muon": _of(3, 1, "optimizer.type=Muon"),
    "1, fp32, 8, z-loss": _of(1, 8, "megagpt.regularization.z_loss=0.001"),
}
TRAFFIC = {
    **{f"{stage}": _of(stage, 1) for stage in range(4)},
    "0, bf16": _of(0, 1, BF16),
    "2, sent in fp32": _of(2, 1, BF16, "communication_data_type=fp32"),
    "3, bf16, little stays": _of(3, 1, BF16, "zero_optimization.stage3_param_persistence_threshold=1000"),
    "3, gathered again": _of(
        3, 1, "zero_optimization.stage3_max_reuse_distance=0", "zero_optimization.stage3_prefetch_bucket_size=0"
    ),
    "1, llama": _of(1, 1, *LLAMA),
    "1, speedrun, Muon": _of(1, 1, "megagpt.model.preset=speedrun", "optimizer.type=Muon"),
    "3, llama, gathered again": _of(
        3, 1, *LLAMA, "zero_optimization.stage3_max_reuse_distance=0", "zero_optimization.stage3_prefetch_bucket_size=0"
    ),
    "1, positions shared": _of(1, 1, "sequence_parallel_size=2"),
    "1, positions shared, recomputed": _of(1, 1, "sequence_parallel_size=2", FULL),
    # The last: DeepSpeed keeps the groups of hpZ for the whole process.
    "3, hpZ": _of(
        *(3, 1, "zero_optimization.zero_hpz_partition_size=2", "zero_optimization.stage3_max_reuse_distance=0"),
        "zero_optimization.stage3_prefetch_bucket_size=0",
    ),
}


def run_and_batch(folder: Path, options: list[str], n_ranks: int) -> tuple[RunConfig, BatchPlan]:
    run = debug_run(folder, folder, *SIZES, *options)
    return run, batch_plan(run.deepspeed, n_ranks)


def train_steps(n: int, folder: Path, options: list[str], device: torch.device) -> dict[str, int]:
    """Build an engine and make n steps; returns the bytes of each collective in the last one."""
    from deepspeed.comm.comm import comms_logger

    from megagpt.engine.build import build_engine
    from megagpt.model.loss import next_token_score

    run, batch = run_and_batch(folder, options, world_size())
    engine = build_engine(run, batch, VOCAB, device)
    gc.collect()
    for _ in range(n):
        comms_logger.comms_dict.clear()
        comms_logger.enabled = comms_logger.prof_all = True
        for _ in range(batch.accumulation):
            shape = (batch.micro_batch, run.megagpt.seq_len // batch.sequence_parallel_size)
            inputs, targets = torch.randint(0, VOCAB, (2, *shape))
            engine.backward(engine(inputs, score=next_token_score(targets)))
            engine.step()
        comms_logger.enabled = False
    return {
        name: sum(size * count for size, (count, *_) in sizes.items() if size > 8)  # not norms and flags
        for name, sizes in comms_logger.comms_dict.items()
    }


def most_alive(folder: Path, options: list[str], device: torch.device) -> int:
    """The most bytes alive from before the engine is built: in the second step all states and activations are."""
    with LiveBytes() as live:
        train_steps(2, folder, options, device)
    return live.peak


def sent_in_a_step(folder: Path, options: list[str], device: torch.device) -> dict[str, int]:
    """The bytes of each collective in the third step: in the second, stage 3 still learns the order of modules."""
    return train_steps(3, folder, options, device)


if __name__ == "__main__":
    device, out = init_process_group(), Path(sys.argv[1])
    settings, measured = {"memory": (MEMORY, most_alive), "traffic": (TRAFFIC, sent_in_a_step)}[sys.argv[2]]
    found = {name: measured(out.parent, options, device) for name, options in settings.items()}
    if rank() == 0:
        out.write_text(json.dumps(found))
    leave()
