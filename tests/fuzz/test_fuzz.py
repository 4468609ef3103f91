"""Each fuzzing target, from whole files on; campaigns of hours are started by hand."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import DEBUG_RUN, ROOT, environment

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (pip install atheris)"
)
@pytest.mark.parametrize("target", ["commit", "environment", "hosts", "manifest", "pickle", "run_file", "tokenizer"])
def test_a_parser_takes_or_refuses_whatever_bytes_come(target, dataset, tmp_path):
    whole = {
        "commit": DEBUG_RUN,  # JSON is what they have in common
        "hosts": ROOT / "launch" / "hostfile.example",
        "manifest": dataset / "manifest.json",
        "run_file": DEBUG_RUN,
        "tokenizer": dataset / "tokenizer.model",
    }
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    (seeds / "a").write_text("A=1\n")
    if target in whole:
        shutil.copy(whole[target], seeds)
    command = [sys.executable, FUZZ, target, seeds, "-runs=20000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
