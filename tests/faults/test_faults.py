"""The campaign's short form in the suite, and a longer one in `make test-long`; `make faults` runs all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.process
@pytest.mark.parametrize("n", [24, pytest.param(120, marks=pytest.mark.long)])
def test_what_is_struck_goes_on_as_if_nothing_had_been(n, tmp_path):
    """Kills in a save and at random times, signals, rotten files, full disks, other run files: a seeded sample."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, CAMPAIGN, "--sample", str(n), "--results", results]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == n
    assert not [row for row in rows if row["verdict"] not in ("recovered", "refused") or row["note"]]
