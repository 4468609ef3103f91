"""Fixtures that test files share, how tests are spread over processes, and the check of which of them start any."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests compute in several processes at the same time

import processes
import pytest
import torch
from hypothesis import settings
from support import build_dataset, build_noise, leave_old_objects_alone, leave_plots_blank, leave_writes_in_memory
from xdist.scheduler import LoadScopeScheduling

from megagpt.distributed.process_group import init_process_group

settings.register_profile("megagpt", deadline=None)  # how long an example takes is for benchmarks to say
settings.load_profile("megagpt")
if "MEGAGPT_TEST_GPU" not in os.environ:  # ranks that share a machine, and numbers, are a CPU's
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
leave_old_objects_alone()
leave_plots_blank()
leave_writes_in_memory()
processes.watch()

# Files whose tests one worker runs. The hosts of cluster/ must be in one, since they share a bridge. Both groups wait
# more than they compute, so that another worker has the cores.
TOGETHER = {
    "cluster/": "hosts",
    "cli/test_pretrain.py": "waits",
    "guards/test_watchdog.py": "waits",
}
# files whose tests share nothing that takes long, and are many or long
APART = (
    "checkpoint/test_async_writer.py",
    "cli/test_verify_resume.py",
    "data_tools/test_build_faults.py",
    "guards/test_out_of_memory.py",
)
# groups by how they begin: half a minute or more each, the longest first
LONGEST = (
    "hosts",
    "waits",
    "train/test_two_ranks.py",
    "engine/test_sequence_parallel.py",
    "engine/test_compilation.py",
    "engine/test_reshard.py",
    "planner/test_estimate.py",
    "guards/test_guards.py",
    "cli/test_verify_resume.py",
    "faults/",
    "guards/test_out_of_memory.py",
    "checkpoint/test_async_writer.py",
    "engine/test_long_context.py",
    "checkpoint/test_save_and_load.py",
    "data_tools/test_build_faults.py",
    "engine/test_build.py",
)


def group(nodeid: str) -> str:
    """The name that this test shares with those which the same worker runs, in one go."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    for begins, name in TOGETHER.items():
        if path.startswith(begins):
            return name
    return nodeid.removeprefix("tests/") if path in APART else path


class ByGroup(LoadScopeScheduling):
    """xdist's own `loadgroup` puts names into node ids, which pytest 9.2 no longer lets it."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker for each core that this process may use, and four at most: few tests are longer than that.

    One more where tests start processes. They wait for those to connect, to notice a fault or to end, so that two
    workers left two cores idle for a fifth of the time.
    """
    waits = "not process" not in config.option.markexpr
    return min(4, len(os.sched_getaffinity(0))) + waits


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what starts processes in a fixture: `-m` reads it before the hook below."""
    if any(processes.starts_some(definition.func) for definition in fixtures(item)):
        item.add_marker("process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: [not group(item.nodeid).startswith(name) for name in LONGEST])


def starts_processes(item: pytest.Item) -> bool:
    return item.get_closest_marker("process") is not None


def fixtures(item: pytest.Item) -> list[pytest.FixtureDef[Any]]:
    """All that a test asks for, directly and through others."""
    if not isinstance(item, pytest.Function):  # of unittest's kind
        return []
    return [definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Around a test and its fixtures: see processes.py."""
    with processes.allowed(starts_processes(item)):
        return (yield)


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
