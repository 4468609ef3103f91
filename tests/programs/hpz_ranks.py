"""Four ranks at ZeRO stage 3, plain, with a secondary partition over two ranks, and with that cut in two."""

from pathlib import Path

from deepspeed.utils import groups
from support import debug_run, metric, run_scenarios

from megagpt.distributed.process_group import init_process_group
from megagpt.train.trainer import train

DEVICE = init_process_group()
STEPS = 8
PLAIN = [
    f"megagpt.schedule.max_steps={STEPS}",
    "zero_optimization.stage=3",
    "train_micro_batch_size_per_gpu=2",
    "megagpt.data.val_tokens=128",
    'megagpt.every={"log": 1, "eval": 0, "save": 4}',
]
HPZ = [*PLAIN, "zero_optimization.zero_hpz_partition_size=2"]


def plain(dataset: Path, folder: Path) -> dict[int, float]:
    train(debug_run(dataset, folder, *PLAIN), DEVICE)
    return metric(folder, "train/loss")


def hpz(dataset: Path, folder: Path) -> dict[int, float]:
    train_as_a_new_process(dataset, folder)
    return metric(folder, "train/loss")


def hpz_cut(dataset: Path, folder: Path) -> dict[int, float]:
    train_as_a_new_process(dataset, folder, stop_at=STEPS // 2)
    train_as_a_new_process(dataset, folder)
    return metric(folder, "train/loss")


def train_as_a_new_process(dataset: Path, folder: Path, stop_at: int | None = None) -> None:
    """DeepSpeed makes the groups of a secondary partition once in each process."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    train(debug_run(dataset, folder, *HPZ), DEVICE, stop_at=stop_at)


if __name__ == "__main__":
    run_scenarios([plain, hpz, hpz_cut])
