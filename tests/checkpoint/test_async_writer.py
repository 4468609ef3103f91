"""Saves that are written while training continues: the same files, and never half of one."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import PROGRAMS, ROOT, debug_run, environment, metric
from torch.multiprocessing import start_processes

from megagpt.checkpoint.async_writer import HostCopies, Writer
from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.save import write_state
from megagpt.cli.verify_resume import same
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import leave
from megagpt.errors import UserError
from megagpt.train import session
from megagpt.train.trainer import train

OFTEN = [
    "megagpt.schedule.max_steps=6",
    'megagpt.every={"log": 1, "eval": 0, "save": 2}',
    "megagpt.keep.last=3",
    "megagpt.data.val_tokens=128",
    "megagpt.regularization.dropout=0.1",
]


def test_a_copy_is_what_torch_would_load_again_and_no_later_change_reaches_it(tmp_path):
    tied = torch.randn(4, 6)
    state = {
        "tied": [tied, tied[1:, ::2], tied],
        "parameter": torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16)),
        "scale": torch.tensor(2.0),
        "empty": torch.empty(0),
        "names": ("a", {"b": None}),
    }
    torch.save(state, tmp_path / "expected")
    copies = HostCopies()
    copy = copies.of(state)
    for tensor in (tied, state["parameter"].data, state["scale"]):
        tensor.zero_()
    expected = torch.load(tmp_path / "expected", weights_only=False)
    assert same(copy, expected)
    copy["tied"][2][1, 0] = 7.0
    assert copy["tied"][0][1, 0] == copy["tied"][1][0, 0] == 7.0

    address = copy["parameter"].data_ptr()
    again = copies.of(state)
    assert same(again, state)
    assert again["parameter"].data_ptr() == address  # the memory of the copy before


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_the_files_are_the_same_asynchronously_and_at_once_and_by_deepspeeds_own_writer(
    dataset, device, tmp_path, monkeypatch, stage, dtype
):
    """To the last bit of every tensor, for every step of two runs and for what the engine itself saves at the end."""
    engines = []
    original = session.build_engine
    monkeypatch.setattr(session, "build_engine", lambda *a, **kw: engines.append(original(*a, **kw)) or engines[-1])
    options = [*OFTEN, f"zero_optimization.stage={stage}", f"bf16.enabled={json.dumps(dtype == 'bf16')}"]
    for way in (False, True):
        train(debug_run(dataset, tmp_path / "run", *options, f"megagpt.save_async={json.dumps(way)}"), device)
        (tmp_path / "run").rename(tmp_path / str(way))
    assert set(metric(tmp_path / "True", "perf/write_seconds")) == set(metric(tmp_path / "True", "perf/save_seconds"))
    at_once, later = committed(tmp_path / "False"), committed(tmp_path / "True")
    assert len(at_once) == len(later) == 3
    for a, b in zip(at_once, later, strict=True):
        assert (a / "rng.0.json").read_bytes() == (b / "rng.0.json").read_bytes()
        assert all(same(loaded(path), loaded(b / path.name)) for path in a.glob("*.pt"))
    engines[0].save_checkpoint(str(tmp_path / "deepspeed"), tag="whole", save_latest=False)
    theirs = list((tmp_path / "deepspeed" / "whole").glob("*.pt"))
    assert theirs
    assert all(same(loaded(path), loaded(at_once[-1] / path.name)) for path in theirs)


def loaded(path: Path):
    return torch.load(path, weights_only=False)


def test_a_full_disk_is_the_error_that_it_was(tmp_path):
    """torch turns it into one of its own, about a position in the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_state(tmp_path / "state.pt", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_went_wrong_in_the_thread_is_known_without_waiting_and_raised_once(device):
    def fail(files):
        raise UserError("no room")

    writer = Writer(asynchronous=True)
    writer.start({}, fail)
    while not writer.failed:
        pass
    with pytest.raises(UserError, match="no room"):
        writer.wait()
    assert not writer.failed
    writer.wait()


def killed_saves(dataset: Path, folder: Path, every: int) -> list[dict]:
    program = [sys.executable, PROGRAMS / "killed_saves.py", dataset, folder, every]
    done = subprocess.run(
        list(map(str, program)),
        cwd=ROOT,
        env=environment() | {"OMP_NUM_THREADS": "1"},  # a pool of threads does not outlive a fork
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.process
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_change_a_save_makes_the_run_goes_on_from_the_newest_commit_to_the_last_bit(
    dataset, tmp_path, every
):
    found = killed_saves(dataset, tmp_path, every)
    assert len(found) * every > 60
    for trial in found:
        assert trial["newest"] >= "step_00000004", trial  # what was there before the first strike
        assert (trial["damaged"], trial["resumed_there"], trial["differs"]) == ([], True, []), trial


def after_leaving(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    leave()
    (folder / f"{rank}").write_text(json.dumps(gather_objects(rank, group)))


@pytest.mark.process
def test_a_rank_that_has_left_the_others_does_not_take_itself_for_all(tmp_path):
    """A writer that is still at work would commit a step of its own files alone."""
    start_processes(after_leaving, (tmp_path,), 2)
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [[0, 1], [0, 1]]
