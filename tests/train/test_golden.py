"""The losses of the debug run file, written down once: a change that should not alter numbers must not.

`python tests/train/test_golden.py` writes them anew, for a change that should.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from support import build_dataset, debug_run, metric

from megagpt.distributed.process_group import init_process_group
from megagpt.train.trainer import train

GOLDEN = Path(__file__).with_name("golden_debug_cpu.json")


@pytest.fixture(scope="module")
def losses(dataset, device, tmp_path_factory):
    return [one_run(dataset, tmp_path_factory.mktemp("golden") / "run") for _ in range(2)]


def one_run(dataset: Path, out_dir: Path) -> dict[int, float]:
    train(debug_run(dataset, out_dir), init_process_group())
    return metric(out_dir, "train/loss")


def test_losses_equal_the_golden_ones(losses):
    """Within 1e-3: kernels of other processors and library versions round differently."""
    golden = json.loads(GOLDEN.read_text())
    assert losses[0] == pytest.approx({int(step): loss for step, loss in golden["losses"].items()}, rel=1e-3)


def test_two_runs_of_one_build_are_equal_to_the_last_bit(losses):
    assert losses[0] == losses[1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = one_run(build_dataset(Path(folder) / "corpus"), Path(folder) / "run")
    versions = {name: version(name) for name in ("torch", "deepspeed", "sentencepiece")}
    GOLDEN.write_text(json.dumps({"versions": versions, "losses": found}, indent=1) + "\n")
    sys.exit(0)
