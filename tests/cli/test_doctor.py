"""`megagpt doctor` on this machine alone; tests/cluster has clusters of hosts with planted faults."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from support import DEBUG_RUN, overrides

from megagpt.__main__ import main
from megagpt.cli.doctor.command import as_text


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


@pytest.mark.process
def test_without_a_run_file_each_thing_that_was_looked_at_is_a_line(capsys):
    main(["doctor"])
    printed = capsys.readouterr().out.splitlines()
    for name, value in (("Python", platform.python_version()), ("torch", torch.__version__), ("cores", os.cpu_count())):
        assert f"{name}: {value}" in printed
    named = {line.partition(":")[0] for line in printed}
    assert {"compiler", "GPUs", "memory", "port 29500", "run file"} <= named
    assert printed[-1].startswith("localhost: ")


@pytest.mark.process
def test_a_run_file_that_is_wrong_and_a_folder_that_cannot_be_written_are_findings_with_the_facts(capsys, tmp_path):
    code, found = doctor(capsys, "megagpt.model.n_layer=0")
    assert code == 2
    assert [finding["check"] for finding in found["findings"]] == ["run file"]
    assert "megagpt.model.n_layer=0" in found["findings"][0]["text"]
    assert found["hosts"]["localhost"]["torch"] == torch.__version__

    code, found = doctor(capsys, *overrides(tmp_path, Path("/proc/runs")))
    assert code == 2
    assert {finding["check"] for finding in found["findings"]} == {"out_dir", "data"}


def test_facts_are_one_line_where_hosts_agree_and_one_for_each_value_where_they_differ():
    facts = {"h1": {"torch": "2.12", "cores": "2"}, "h2": {"torch": "2.12", "cores": "4"}, "h3": {"torch": "2.12"}}
    found = {"findings": [], "hosts": facts, "all_reduce_gb_per_s": 1.5}
    assert as_text(found).splitlines() == [
        "torch: 2.12",
        "cores: 2 (h1)",
        "cores: 4 (h2)",
        "cores: absent (h3)",
        "h1, h2, h3: nothing to fix; an all-reduce sends 1.50 GB/s from each",
    ]
