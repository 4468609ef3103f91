"""A host that is slower than the others, which all wait for."""

import pytest
from support import DEBUG_RUN, ROOT, held_up, overrides


@pytest.mark.long
def test_a_throttled_host_is_named(raise_cluster, dataset, tmp_path):
    cluster = raise_cluster(2)
    many = ["megagpt.schedule.max_steps=100000", 'megagpt.every={"log": 10, "eval": 0, "save": 0}']
    start = ["deepspeed", "--hostfile", cluster.hostfile(), ROOT / "launch" / "pretrain.py"]
    program = cluster["h1"].start(*start, "--deepspeed_config", DEBUG_RUN, *overrides(dataset, tmp_path, *many))
    program.until("/100000 | train/loss")
    rank = cluster["h2"].rank()
    with held_up(rank.pid):
        program.until("straggler: rank 1 on h2 slows")
        program.until("| waits for h2 |")
    assert "straggler: rank 0" not in program.output
    rank.terminate()
    assert program.end() == 75
