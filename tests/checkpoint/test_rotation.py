"""Rotation by itself, on folders as small as a commit can be: which steps stay, and a real kill at each point of it."""

import json
import os
import shutil
import signal
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt import atomic_files as files
from megagpt.checkpoint.commit import (
    COMMIT,
    _digest,
    best,
    committed,
    damage_of,
    newest_record,
    step_folder,
    update_latest_and_best,
    write_commit,
    write_rank_manifest,
)
from megagpt.checkpoint.identity import Identity
from megagpt.checkpoint.rotation import prune, steps_to_delete
from megagpt.config.schema import KeepConfig
from megagpt.data.mixture import Mixture
from megagpt.errors import UserError
from megagpt.train.early_stopping import EarlyStopping
from megagpt.train_state import TrainState

CHANGES = {"os.remove", "os.rmdir", "os.rename", "shutil.rmtree"}  # audit events of what alters a folder


def identity(world_size):
    return Identity(world_size, 1, "none", "fp32", {}, 128, "0" * 64, {}, "matrices")


def commit(out_dir, step, val_loss=None, best_step=0):
    step_dir = step_folder(out_dir, step)
    step_dir.mkdir(parents=True)
    for name in ("model.pt", "rng.0.json"):
        (step_dir / name).write_text(f"{name} of step {step}")
    state = TrainState(step=step, val_loss=val_loss, stopper=EarlyStopping(best_step=best_step))
    write_commit(step_dir, state, Mixture(seed=0), identity(1), [write_rank_manifest(step_dir, 0)])
    return step_dir, state


def test_a_commit_without_the_files_of_all_ranks_is_damage(tmp_path):
    step_dir, state = commit(tmp_path, 10)
    assert damage_of(step_dir, 0, every=1) is None
    write_commit(step_dir, state, Mixture(seed=0), identity(2), [write_rank_manifest(step_dir, 0)])
    assert damage_of(step_dir, 0, every=1) == f"{step_dir} has the files of 1 ranks, not of 2"


def test_a_commit_of_nothing_but_brackets_is_damage(tmp_path):
    step_dir, _ = commit(tmp_path, 10)
    (step_dir / COMMIT).write_text("[" * 10**5)
    assert damage_of(step_dir, 0) == f"{step_dir / COMMIT} was changed"


@pytest.mark.parametrize("missing", ["version", "state", "mixture", "identity"])
def test_a_commit_that_lacks_something_and_was_signed_again_is_one_message(tmp_path, missing):
    step_dir, _ = commit(tmp_path, 10)
    record = json.loads((step_dir / COMMIT).read_text())
    del record["sha256"], record[missing]
    (step_dir / COMMIT).write_text(json.dumps(record | {"sha256": _digest(record)}))
    with pytest.raises(UserError, match="step_00000010"):
        newest_record(tmp_path)


def steps_of(out_dir):
    return [int(path.name.removeprefix("step_")) for path in committed(out_dir)]


@pytest.fixture
def run_dir(tmp_path):
    """Seven committed steps, of which a rotation removes three, and what an attempt left that died while it saved."""
    for step, loss in zip((10, 20, 30, 40, 50, 60, 70), (5.0, 3.0, 4.0, 3.5, 4.5, 4.2, 4.1), strict=True):
        last = commit(tmp_path / "run", step, loss)
    torn = step_folder(tmp_path / "run", 35)
    torn.mkdir()
    (torn / "model.pt").write_text("half")
    return tmp_path / "run", last


def test_each_rule_keeps_its_steps(run_dir):
    out_dir, last = run_dir
    update_latest_and_best(out_dir, *last)
    assert best(out_dir).name == "step_00000020"
    kept = {
        (2, 0, 1): [20, 60, 70],
        (3, 0, 1): [20, 50, 60, 70],
        (2, 30, 1): [20, 30, 60, 70],
        (2, 0, 3): [20, 30, 40, 60, 70],
    }
    for (newest, every, n_best), steps in kept.items():
        gone = steps_to_delete(out_dir, KeepConfig(last=newest, every=every, best=n_best))
        assert [int(path.name[5:]) for path in committed(out_dir) if path not in gone] == steps


@settings(max_examples=30)  # each writes and syncs a hundred files
@given(
    losses=st.lists(st.none() | st.floats(1, 9), min_size=1, max_size=12),
    last=st.integers(2, 5),
    every=st.integers(0, 4),
    n_best=st.integers(1, 3),
)
def test_rotation_after_each_commit_never_takes_the_newest_two_or_the_best(
    tmp_path_factory, losses, last, every, n_best
):
    out_dir, keep = tmp_path_factory.mktemp("rotation"), KeepConfig(last=last, every=every, best=n_best)
    for step, loss in enumerate(losses, 1):
        update_latest_and_best(out_dir, *commit(out_dir, step, loss))
        prune(out_dir, keep)
        stay = steps_of(out_dir)
        assert stay[-last:] == list(range(max(1, step - last + 1), step + 1))
        assert not every or set(stay) >= set(range(every, step + 1, every))
        known = [(loss, at) for at, loss in enumerate(losses[:step], 1) if loss is not None]
        assert not known or best(out_dir) == step_folder(out_dir, min(known)[1])
        assert len(stay) <= last + n_best + (step // every if every else 0)
    shutil.rmtree(out_dir)


@pytest.mark.process
def test_killed_at_any_point_of_a_rotation_nothing_is_wrong_and_the_next_one_ends_it(run_dir, tmp_path):
    """kill -9 of a real process just before its n-th change to the folder, for every n until none is left."""
    keep, killed = KeepConfig(), 0
    while True:
        out_dir = tmp_path / f"killed{killed}"
        shutil.copytree(run_dir[0], out_dir)
        last = (step_folder(out_dir, 70), run_dir[1][1])
        pid = os.fork()
        if pid == 0:
            _die_before_change(killed)
            update_latest_and_best(out_dir, *last)
            prune(out_dir, keep)
            os._exit(0)
        ended = os.waitpid(pid, 0)[1]
        assert not [d for path in committed(out_dir) if (d := damage_of(path, 0))]
        assert {20, 60, 70} <= set(steps_of(out_dir))
        update_latest_and_best(out_dir, *last)
        prune(out_dir, keep)
        assert steps_of(out_dir) == [20, 60, 70]
        assert sorted(path.name for path in (out_dir / "checkpoints").glob("step_*")) == [
            f"step_000000{step}" for step in (20, 60, 70)
        ]
        if not os.WIFSIGNALED(ended):
            break
        killed += 1
    assert killed > 20


def _die_before_change(n):
    """SIGKILL to this process itself at the n-th change, counted from 0."""
    changes = iter(range(n, -1, -1))

    def hook(event, args):
        if event in CHANGES and next(changes) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_the_folders_of_a_step_are_durable_before_its_commit_is(tmp_path, monkeypatch):
    """A power cut takes back a name whose folder was not synced; so every name above COMMIT is, and then COMMIT."""
    synced = []

    def noting(path):
        synced.append(path)
        original(path)

    original = files.fsync
    monkeypatch.setattr(files, "fsync", noting)
    monkeypatch.setattr("megagpt.checkpoint.commit.fsync", noting)
    step_dir, _ = commit(tmp_path / "run", 10)
    at = synced.index(step_dir / f"{COMMIT}.tmp")
    owned = {step_dir / name for name in ("model.pt", "rng.0.json", "manifest.0.json.tmp")}
    assert {*owned, step_dir, tmp_path / "run" / "checkpoints", tmp_path / "run", tmp_path} <= set(synced[:at])
    assert synced[at + 1 :] == [step_dir]
