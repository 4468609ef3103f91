"""What ranks compare before they train."""

import shutil
import sys
from pathlib import Path

import pytest
from support import DEBUG_RUN, ROOT, overrides, torchrun

import megagpt
from megagpt.distributed.rendezvous import code_hash


def test_a_byte_changed_in_any_source_file_changes_the_hash_of_our_code(tmp_path):
    package = Path(shutil.copytree(Path(megagpt.__file__).parent, tmp_path / "megagpt"))
    usual = code_hash(package)
    for file in package.rglob("*.py"):
        source = file.read_bytes()
        file.write_bytes(source + b"#")
        assert code_hash(package) != usual, file
        file.write_bytes(source)
    assert code_hash(package) == usual


@pytest.mark.process
def test_ranks_of_which_one_is_to_start_fresh_are_refused(dataset, tmp_path):
    on_one = 'exec "$@" $([ "$RANK" = 1 ] && echo --fresh)'
    pretrain = [sys.executable, ROOT / "launch" / "pretrain.py", "--deepspeed_config", DEBUG_RUN]
    options = overrides(dataset, tmp_path / "run")
    done = torchrun(2, "--no-python", "bash", "-c", on_one, "-", *pretrain, *options, timeout=240)
    assert "--fresh is False on " in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()
