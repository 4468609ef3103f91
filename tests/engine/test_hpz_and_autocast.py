"""Keys of DeepSpeed that change how a run computes, not what: ZeRO++'s secondary partition, and torch's autocast."""

import shutil

import processes
import pytest
from support import debug_run, metric, scenarios

from megagpt.checkpoint.commit import committed
from megagpt.train.trainer import train

STEPS = 8
SHORT = [
    f"megagpt.schedule.max_steps={STEPS}",
    "megagpt.data.val_tokens=128",
    'megagpt.every={"log": 1, "eval": 0, "save": 4}',
]


@pytest.fixture(scope="module")
@processes.start_here
def four_ranks(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpz")
    return folder, scenarios("hpz_ranks.py", dataset, folder, ranks=4)


def test_a_secondary_partition_changes_no_loss(four_ranks):
    _, found = four_ranks
    assert len(found["plain"][0]) == STEPS
    assert found["hpz"][0] == found["plain"][0]


def test_a_run_with_a_secondary_partition_resumes_exactly(four_ranks):
    _, found = four_ranks
    assert found["hpz_cut"][0] == found["hpz"][0]


def test_a_run_with_a_secondary_partition_resumes_on_one_rank_and_another_stage(four_ranks, dataset, device, tmp_path):
    folder, found = four_ranks
    shutil.copytree(folder / "hpz", tmp_path / "run")
    shutil.rmtree(committed(tmp_path / "run")[-1])
    train(debug_run(dataset, tmp_path / "run", *SHORT, "zero_optimization.stage=1"), device)
    losses = metric(tmp_path / "run", "train/loss")
    for step, loss in found["hpz"][0].items():
        assert losses[int(step)] == pytest.approx(loss, abs=1e-4)


AUTOCAST = 'torch_autocast={"enabled": true, "dtype": "bfloat16"}'


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_autocast_rounds_to_bf16_and_resumes_exactly(dataset, device, tmp_path, stage):
    def run(name, *options, stop_at=None):
        more = [*SHORT, f"zero_optimization.stage={stage}", *options]
        train(debug_run(dataset, tmp_path / name, *more), device, stop_at=stop_at)
        return metric(tmp_path / name, "train/loss")

    straight, fp32 = run("straight", AUTOCAST), run("fp32")
    run("cut", AUTOCAST, stop_at=4)
    assert run("cut", AUTOCAST) == straight
    assert straight != fp32
    for step, loss in fp32.items():
        assert straight[step] == pytest.approx(loss, abs=0.02)
