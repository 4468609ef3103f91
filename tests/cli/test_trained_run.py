"""Commands on a run that was copied, or whose data was moved."""

import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from support import DEBUG_RUN, overrides

from megagpt.__main__ import main
from megagpt.checkpoint.commit import COMMIT, _digest, committed
from megagpt.checkpoint.named_step import step_of
from megagpt.cli.pretrain import pretrain

LOSS_IN_RUN = re.compile(
    r"\n  in the run, val/loss of this step was (\d\.\d{4}), on the first 2,048 tokens, "
    r"which (--tokens 2048) reads alone\n"
)


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory):
    """A run of two steps in the folder `run`, on data in the folder `data` next to it."""
    folder = tmp_path_factory.mktemp("trained")
    data = shutil.copytree(dataset, folder / "data")
    steps = ["megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0"]
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides(data, folder / "run", *steps)]) == 0
    return folder


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("run/checkpoints", ["latest", "best", ".", "step_00000002"]),
        ("run", ["checkpoints", ".", "checkpoints/latest"]),
        ("run/checkpoints/step_00000002", [".", "..", "../latest", "../.."]),
    ],
)
def test_a_step_is_found_by_the_name_that_it_has_in_the_folder_one_is_in(trained, monkeypatch, folder, words):
    monkeypatch.chdir(trained / folder)
    for word in words:
        assert step_of(Path(word)).resolve() == committed(trained / "run")[-1], word


def test_a_copied_run_tells_when_it_was_saved_and_an_older_one_that_it_does_not_know(trained, tmp_path, capsys):
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    *_, step_dir = committed(copy)
    record = json.loads((step_dir / COMMIT).read_text())
    os.utime(step_dir / COMMIT, (0, 0))
    capsys.readouterr()
    assert main(["checkpoints", str(copy)]) == 0
    table = capsys.readouterr().out
    assert f" 2  {datetime.fromtimestamp(record['saved_at']):%Y-%m-%d %H:%M:%S}   " in table
    assert "time of the file" not in table
    del record["sha256"], record["saved_at"]
    (step_dir / COMMIT).write_text(json.dumps(record | {"sha256": _digest(record)}))
    os.utime(step_dir / COMMIT, (0, 0))
    assert main(["checkpoints", str(copy)]) == 0
    table = capsys.readouterr().out
    assert f" 2  {datetime.fromtimestamp(0):%Y-%m-%d %H:%M:%S}*" in table
    assert "*: time of the file, which copying changes; the step records none" in table


def test_evaluate_reads_the_runs_own_data_and_asks_for_it_where_it_was_moved(trained, capsys):
    run, data, moved = str(trained / "run"), trained / "data", trained / "moved"
    capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    own = capsys.readouterr().out
    assert main(["evaluate", run, "--split", "train", "--tokens", "64"]) == 0
    assert f"of {data} (train)" in capsys.readouterr().out
    # all tokens; and the run's number, which the option that is named gives
    assert main(["evaluate", run]) == 0
    loss, option = LOSS_IN_RUN.search(capsys.readouterr().out).groups()
    assert main(["evaluate", run, *option.split()]) == 0
    again = capsys.readouterr().out
    assert f"  loss {loss} nats per token" in again
    assert "in the run" not in again
    data.rename(moved)
    assert main(["evaluate", run]) == 2
    assert f"read {data}, which is not here; give its place by --data DIR" in capsys.readouterr().err
    assert main(["evaluate", run, "--json", "--data", str(moved)]) == 0
    assert capsys.readouterr().out == own
