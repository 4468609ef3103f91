"""A process that may not take more memory: what the user is told, in one message."""

import subprocess
import sys
from pathlib import Path

from support import DEBUG_RUN, ROOT, environment, overrides

LIMITED = Path(__file__).with_name("limited_rank.py")
WIDE = ["megagpt.model.n_layer=1", "megagpt.model.n_head=1"]


def test_a_model_that_does_not_fit_is_one_message(dataset, tmp_path):
    """One matrix of it is 3 GiB, and 2 GiB are left."""
    options = overrides(dataset, tmp_path / "run", *WIDE, "megagpt.model.n_embd=16384")
    command = [sys.executable, LIMITED, "--deepspeed_config", DEBUG_RUN, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "out of memory while building the model and its optimizer, on rank 0" in errors[0]
    assert "No setting fits: take more ranks, or a smaller model" in errors[0]
