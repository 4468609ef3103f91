"""Elastic resume when the ranks are on several hosts, where DeepSpeed's universal checkpoints are reported wrong
(DeepSpeed#7601: stage 3)."""

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Cluster
from support import DEBUG_RUN, ROOT, debug_run, metric, overrides

from megagpt.checkpoint.commit import committed, read_commit
from megagpt.train.trainer import train

OPTIONS = [
    "train_micro_batch_size_per_gpu=2",  # of 8, on 1, 2 and 4 ranks
    "megagpt.schedule.shape=constant",  # the same rates to whichever step
    "megagpt.schedule.warmup_steps=0",
    'megagpt.every={"log": 1, "eval": 0, "save": 0}',
    "tensorboard.enabled=false",
]
# each goes on to so many steps: hosts, ranks on each, ZeRO stage
STRETCHES = {6: (2, 1, 3), 12: (2, 2, 1), 18: (2, 1, 3), 24: (1, 1, 2), 30: (2, 2, 3), 36: (2, 1, 0)}


@pytest.mark.long
def test_a_run_goes_on_over_other_hosts_ranks_and_stages_as_one_rank_would(raise_cluster, dataset, device, tmp_path):
    """fp32: losses differ by the order of sums alone, and each sample comes once."""
    cluster = raise_cluster(2)
    for steps, shape in STRETCHES.items():
        said = on_hosts(cluster, shape, tmp_path / f"log{steps}", tmp_path / "run", dataset, steps)
        assert ("resharding weights and optimizer state" in said) == (steps > 6), said
    straight = debug_run(dataset, tmp_path / "straight", *OPTIONS, "megagpt.schedule.max_steps=36")
    train(straight, device)
    losses, expected = (metric(tmp_path / name, "train/loss") for name in ("run", "straight"))
    assert list(losses) == list(range(1, 37))
    assert list(losses.values()) == pytest.approx(list(expected.values()), abs=1e-4)
    assert read_commit(committed(tmp_path / "run")[-1]).state.samples_seen == 36 * 8


def on_hosts(cluster: Cluster, shape: tuple[int, int, int], log: Path, out_dir: Path, dataset: Path, steps: int) -> str:
    """Train up to a step; returns what rank 0 said."""
    n_hosts, per_host, stage = shape
    options = [*OPTIONS, f"zero_optimization.stage={stage}", f"megagpt.schedule.max_steps={steps}"]
    arguments = ["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *options)]
    shared = {"WORLD_SIZE": str(n_hosts * per_host), "LOCAL_WORLD_SIZE": str(per_host)}
    shared |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "24600", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = []
    for r in range(n_hosts * per_host):
        host = cluster[f"h{r // per_host + 1}"]
        variables = shared | {"RANK": str(r), "LOCAL_RANK": str(r % per_host)}
        command = host.command(sys.executable, ROOT / "launch" / "pretrain.py", *arguments, env=variables, cwd=ROOT)
        with log.with_suffix(f".{r}").open("w") as file:
            ranks.append(subprocess.Popen(command, env=host.environment, stdout=file, stderr=subprocess.STDOUT))
    codes = [rank.wait(300) for rank in ranks]
    said = log.with_suffix(".0").read_text()
    assert set(codes) == {0}, f"{codes}: {said[-3000:]}"
    return said
