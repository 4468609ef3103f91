"""Each fuzzing target, from whole files on; campaigns of hours are started by hand."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import DEBUG_RUN, ROOT, environment

FUZZ = Path(__file__).with_name("fuzz.py")
TARGETS = re.findall(r'^    "(\w+)": \w+,$', FUZZ.read_text(), re.MULTILINE)  # it cannot be imported without atheris


@pytest.mark.process
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason='atheris is not installed (the extra "fuzz")')
@pytest.mark.parametrize("target", TARGETS)
def test_a_parser_takes_or_refuses_whatever_bytes_come(target, dataset, tmp_path):
    whole = {
        "build_config": ROOT / "ds_configs" / "demo_data.json",
        "commit": DEBUG_RUN,  # JSON is what they have in common
        "files_of_a_rank": DEBUG_RUN,
        "generators": DEBUG_RUN,
        "hosts": ROOT / "launch" / "hostfile.example",
        "index": dataset / "index.arrow",
        "manifest": dataset / "manifest.json",
        "run_file": DEBUG_RUN,
        "shard": dataset / "train" / "v0" / "shard-000000.arrow",
        "tokenizer": dataset / "tokenizer.model",
    }
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    (seeds / "a").write_text("A=1\n")
    if target in whole:
        shutil.copy(whole[target], seeds)
    command = [sys.executable, FUZZ, target, seeds, "-runs=20000", "-max_total_time=60", "-seed=1"]
    command += [f"-artifact_prefix={tmp_path}/"]
    variables = environment()
    done = subprocess.run(
        list(map(str, command)), env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
