"""Fixtures: one dataset for all tests, the engine's process group, and one launch of two real ranks."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from support import PROGRAMS, build_dataset, build_noise, read_json, torchrun

from megagpt.distributed.process_group import init_process_group

settings.register_profile("megagpt", deadline=None)  # how long an example takes is for benchmarks to say
settings.load_profile("megagpt")
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))  # more slow tiny models down
if "MEGAGPT_TEST_GPU" not in os.environ:  # ranks that share a machine, and numbers, are a CPU's
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session", autouse=True)
def _own_extensions_folder(tmp_path_factory):
    """A compile killed in another process leaves a lock there that would hang these tests without a word."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(autouse=True)
def _ctrl_c_ends_the_tests():
    """`pretrain`, called in this process, takes it for a wish to save; a shell in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def supports_fp16(device, monkeypatch) -> Callable[[bool], None]:
    """Set what DeepSpeed believes of the device: some processors have instructions for fp16, most have none."""
    from megagpt.engine.build import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator()
    return lambda answer: monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: answer)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build_noise(folder / "noise")
    return build_dataset(folder / "corpus")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """This process as the only rank."""
    return init_process_group()


@pytest.fixture(scope="session")
def two_ranks(dataset, tmp_path_factory) -> dict[str, list[Any]]:
    """Every scenario of tests/programs/two_ranks.py, run in one launch: name -> what rank 0 and rank 1 returned."""
    folder = tmp_path_factory.mktemp("two_ranks")
    done = torchrun(2, PROGRAMS / "two_ranks.py", dataset, folder, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return read_json(folder / "results.json")
