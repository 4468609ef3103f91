"""`megagpt doctor` on this machine alone; tests/cluster has clusters of hosts with planted faults."""

import json

import pytest
from support import DEBUG_RUN, overrides

from megagpt.__main__ import main


def doctor(capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["doctor", str(DEBUG_RUN), "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.process
def test_a_dataset_that_is_not_there_is_one_finding(capsys, tmp_path):
    code, found = doctor(capsys, *overrides(tmp_path / "nowhere", tmp_path / "run"))
    assert code == 2
    [finding] = [finding for finding in found["findings"] if finding["check"] == "data"]
    assert (finding["host"], str(tmp_path / "nowhere") in finding["text"]) == ("localhost", True)
    assert set(found["hosts"]) == {"localhost"}
    assert found["all_reduce_gb_per_s"] is None
    assert not list(tmp_path.glob("**/.megagpt*"))
