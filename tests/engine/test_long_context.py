"""What a long sequence costs: memory follows the number of tokens, not the square of their number in a sample."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import DEBUG_RUN, ROOT, build_dataset, environment, metric, overrides

MODEL = '{{"n_layer": 1, "n_head": 1, "n_embd": 32, "seq_len": {}}}'


def peak_gib(dataset: Path, out_dir: Path, rows: int, seq_len: int) -> float:
    """Of a process that trains two steps of rows x seq_len tokens and evaluates."""
    options = [
        f"megagpt.model={MODEL.format(seq_len)}",
        f"train_batch_size={rows}",
        f"train_micro_batch_size_per_gpu={rows}",
        f"megagpt.data.val_tokens={rows * seq_len}",
        "megagpt.schedule.max_steps=2",
        "megagpt.schedule.warmup_steps=1",
        "megagpt.recompute.policy=full",
        "megagpt.every.sample=0",
    ]
    command = [sys.executable, ROOT / "launch/pretrain.py", "--deepspeed_config", DEBUG_RUN]
    subprocess.run(
        [*map(str, command), *overrides(dataset, out_dir, *options)], env=environment(), cwd=ROOT, check=True
    )
    losses = metric(out_dir, "train/loss")
    assert losses[2] < losses[1]
    return max(metric(out_dir, "perf/memory_gib").values())


@pytest.mark.process
def test_one_sample_of_16384_tokens_trains_in_the_memory_of_four_of_4096(tmp_path):
    """The scores of attention alone would be 1 GiB, and 0.25; the rest grows by 12,288 more positions of 32 numbers."""
    dataset = build_dataset(tmp_path / "corpus", n_documents=400)
    long, short = (peak_gib(dataset, tmp_path / f"of_{n}", 16384 // n, n) for n in (16384, 4096))
    assert long < short + 0.25
