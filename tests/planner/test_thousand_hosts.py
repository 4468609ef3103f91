"""A hostfile of 1,000 hosts, and a run on their 8,000 GPUs."""

import json

from support import ROOT

from megagpt.__main__ import main
from megagpt.distributed.hostfile import check_hosts

HOSTS, SLOTS = 1_000, 8
RUN_FILE = str(ROOT / "ds_configs" / "llama_7b.json")


def test_a_hostfile_of_a_thousand_hosts_is_parsed_planned_and_linted(tmp_path, capsys):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"node-{i:04}.cluster.example slots={SLOTS}\n" for i in range(HOSTS)))
    ranks = sum(check_hosts(hostfile).values())
    assert ranks == HOSTS * SLOTS
    options = ["--ranks", str(ranks), f"train_batch_size={ranks}", f"megagpt.data.train.0.path={tmp_path}"]
    assert main(["lint", RUN_FILE, *options, "--json"]) == 0
    assert [found for found in json.loads(capsys.readouterr().out)["findings"] if found["level"] == "error"] == []
    assert main(["plan", RUN_FILE, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["network"]["ranks"] == ranks
    # One sequence for each GPU: stages 0 to 3 with their offloads, and three ways to recompute, after its own.
    assert len(found["settings"]) == 1 + 8 * 3
    assert found["fastest"]["stage"] < 3  # whose loops over 8,000 ranks bound the step


def test_more_ranks_than_the_batch_has_samples_are_refused_with_numbers_that_work(capsys):
    assert main(["plan", RUN_FILE, "--ranks", str(HOSTS * SLOTS)]) == 2
    told = capsys.readouterr().err
    assert "train_batch_size=1024 is not a multiple of train_micro_batch_size_per_gpu=1 x 8000 ranks = 8000" in told
    assert "set train_batch_size to 8000, or give --ranks 1024" in told
