"""Two starts of one run: one trains, and the other is refused. Readers work meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from rival_starts import refusal
from support import DEBUG_RUN, ROOT, debug_run, environment, metric, overrides

import megagpt
from data_tools.inspect import inspect_samples
from megagpt.__main__ import main
from megagpt.checkpoint import commit, load, rotation, run_lock
from megagpt.checkpoint.commit import committed, newest_record
from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.run_lock import RunLock
from megagpt.cli import checkpoints
from megagpt.cli.pretrain import pretrain
from megagpt.errors import UserError
from megagpt.file_lock import LOCK, FileLock, LockHeldError, locks_on_one_host
from megagpt.train.trainer import train

SHORT = [
    'megagpt.schedule={"max_steps": 4}',
    'megagpt.every={"log": 1, "eval": 0, "save": 2}',
    "megagpt.data.val_tokens=256",
]


def arguments(dataset, out_dir, *more):
    return ["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *SHORT, *more)]


def start(dataset, out_dir, *more, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments(dataset, out_dir, *more)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.process
def test_a_second_start_is_refused_readers_are_not_and_after_kill_9_the_next_start_resumes(
    dataset, tmp_path, capfd, device
):
    out_dir = tmp_path / "run"
    keep = ["megagpt.every.save=1", "megagpt.every.eval=1"]
    first = start(dataset, out_dir, *keep, "megagpt.schedule.max_steps=100000")
    try:
        assert first.stdout is not None
        while len(committed(out_dir)) < 3:
            assert first.stdout.readline(), first.communicate()
        threading.Thread(target=first.stdout.read, daemon=True).start()  # it must not wait for us
        for more in ([], ["--fresh"], ["megagpt.every.save=7"]):
            assert pretrain([*arguments(dataset, out_dir), *more]) == 2
            refusal = capfd.readouterr().err
            assert f"in use by another run, process {first.pid} on host " in refusal
            assert len(refusal.splitlines()) == 1
        # steps are deleted all the time while these read
        assert load_model(out_dir, torch.device("cpu")).step_dir.parent.parent == out_dir
        for _ in range(5):
            assert megagpt.load(out_dir / "checkpoints" / "latest").score("abc").tokens == 3
        assert main(["checkpoints", str(out_dir), "--verify"]) == 0
        assert "--- sample 0: " in inspect_samples(out_dir, step=1)
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    newest = committed(out_dir)[-1]
    last = int(newest.name.removeprefix("step_")) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # --fresh renamed nothing
    assert pretrain([*arguments(dataset, out_dir), *keep, f"megagpt.schedule.max_steps={last}"]) == 0
    assert f"resuming from {newest}\n" in capfd.readouterr().out
    assert (out_dir / LOCK).read_bytes() == b""


@pytest.mark.process
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_of_two_starts_at_once_one_runs_and_one_is_refused(dataset, tmp_path, rounds):
    """In each round but the first they resume, or archive, a run that was killed a moment ago."""
    out_dir = tmp_path / "run"
    for n in range(rounds):
        more = ["megagpt.schedule.max_steps=100000", *(["--fresh"] if n % 2 else [])]
        starts = [start(dataset, out_dir, *more, stdout=subprocess.DEVNULL) for _ in range(2)]
        said, holder = refusal(starts, out_dir, lambda holder: os.kill(holder["pid"], signal.SIGKILL))
        assert f"in use by another run, process {holder['pid']} on host " in said
        steps = list(metric(out_dir, "train/loss"))
        assert steps == list(range(1, len(steps) + 1))
    assert len(list(tmp_path.glob("run.old*"))) == rounds // 2


def test_one_of_many_that_take_a_lock_at_once_gets_it(tmp_path):
    """Each opens the file for itself, as processes do."""
    barrier, got = threading.Barrier(8), []

    def contend(number: int) -> None:
        for round_ in range(50):
            folder = tmp_path / f"run{round_}"
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / LOCK)
            barrier.wait()
            try:
                lock.take()
                got.append((round_, number))
            except LockHeldError:
                pass
            barrier.wait()
            lock.release()

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [round_ for round_, _ in sorted(got)] == list(range(50))


@pytest.mark.process
def test_a_forked_process_that_lives_longer_does_not_keep_the_lock(tmp_path):
    lock = FileLock(tmp_path / LOCK)
    lock.take()
    waits, ends = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(ends)
        os.read(waits, 1)
        os._exit(0)
    with pytest.raises(LockHeldError):
        FileLock(tmp_path / LOCK).take()
    lock.release()
    FileLock(tmp_path / LOCK).take()
    os.close(ends)
    os.waitpid(pid, 0)


def test_a_lock_without_a_readable_holder_is_still_one(tmp_path):
    held = FileLock(tmp_path / LOCK)
    held.take()
    (tmp_path / LOCK).write_text('{"pid": "x"')
    with pytest.raises(LockHeldError, match="a process that has just started"):
        FileLock(tmp_path / LOCK).take()


def test_a_holder_that_has_just_begun_is_named(tmp_path):
    """It locks the file first and writes into it then."""
    held = FileLock(tmp_path / LOCK)
    held.take()
    whole = (tmp_path / LOCK).read_bytes()
    (tmp_path / LOCK).write_bytes(b"")
    later = threading.Timer(0.3, (tmp_path / LOCK).write_bytes, [whole])
    later.start()
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} on host"):
        FileLock(tmp_path / LOCK).take()
    later.join()


@pytest.mark.parametrize(
    ("fstype", "options", "alone"),
    [
        ("ext4", "rw", False),
        ("nfs4", "rw,vers=4.2,local_lock=none", False),
        ("nfs", "rw,vers=3,nolock", True),
        ("nfs", "rw,local_lock=all", True),
        ("lustre", "rw,flock", False),
        ("lustre", "rw,localflock", True),
        ("fuse.sshfs", "rw", True),
        ("fuseblk", "rw", False),  # a local NTFS disk
    ],
)
def test_a_file_system_whose_locks_other_hosts_do_not_see_is_known(fstype, options, alone):
    assert locks_on_one_host(fstype, set(options.split(","))) == alone


def test_a_file_system_without_locks_is_reported_and_used(dataset, device, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert train(debug_run(dataset, tmp_path / "run", *SHORT), device).step == 4
    said = capsys.readouterr().out
    assert f"the file system of {tmp_path / 'run'} has no locks (Function not implemented), so a second run" in said


def test_a_restart_by_a_launcher_waits_for_the_attempt_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("megagpt.file_lock.POLL_SECONDS", 0.001)
    said: list[str] = []
    with RunLock(tmp_path / "run") as before:

        def print_rank0(text: str) -> None:
            said.append(text)
            before._lock.release()  # the attempt before ends now

        monkeypatch.setattr(run_lock, "print_rank0", print_rank0)
        with RunLock(tmp_path / "run"):
            pass
    assert len(said) == 1
    assert "waiting up to 120 s for the attempt before this one to end (process " in said[0]


def test_a_run_whose_folder_was_replaced_stops_before_it_saves(tmp_path):
    out_dir = tmp_path / "run"
    with RunLock(out_dir) as first:
        first.check()
        out_dir.rename(tmp_path / "elsewhere")
        with RunLock(out_dir), pytest.raises(UserError, match=r"was renamed or deleted .* another run has begun there"):
            first.check()
    with RunLock(out_dir) as alone:
        shutil.rmtree(out_dir)
        alone.check()  # nobody else is there
        with pytest.raises(UserError, match="in use by another run"), RunLock(out_dir):
            pass


def test_a_run_whose_folder_was_replaced_by_a_file_stops_before_it_saves(tmp_path):
    out_dir = tmp_path / "run"
    with RunLock(out_dir) as lock:
        out_dir.rename(tmp_path / "elsewhere")
        out_dir.touch()
        with pytest.raises(UserError, match=rf"megagpt\.out_dir={out_dir} cannot be written: "):
            lock.check()


def test_a_live_run_does_not_save_into_a_run_that_took_its_place(dataset, device, tmp_path, monkeypatch):
    out_dir, check = tmp_path / "run", RunLock.check

    def moved(self):
        if out_dir.is_dir() and not (tmp_path / "moved").exists():
            out_dir.rename(tmp_path / "moved")
            with RunLock(out_dir):
                (out_dir / "run.json").touch()
                check(self)

    monkeypatch.setattr(RunLock, "check", moved)
    with pytest.raises(UserError, match="another run has begun there"):
        train(debug_run(dataset, out_dir, *SHORT), device)
    assert sorted(path.name for path in out_dir.iterdir()) == [LOCK, "run.json"]


def test_a_refused_run_file_leaves_no_folder(dataset, tmp_path):
    more = ["megagpt.data.val=/nowhere"]
    assert pretrain([*arguments(dataset, tmp_path / "new" / "run"), *more]) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    assert pretrain([*arguments(dataset, tmp_path / "mine"), *more]) == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_fresh_renames_the_folder_and_not_a_link_to_it(dataset, device, tmp_path):
    """The new run is on the disk that the link names, too, also where the link came before its folder."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "run")
    run = debug_run(dataset, link, *SHORT)
    train(run, device)
    train(run, device, fresh=True)
    assert link.readlink() == disk / "run"
    assert sorted(path.name for path in disk.iterdir()) == ["run", "run.old1"]
    assert list(metric(disk / "run", "train/loss")) == [1, 2, 3, 4]
    assert list(tmp_path.glob("link.old*")) == []


def test_fresh_does_not_rename_what_is_in_use_or_in_vain(dataset, device, tmp_path, monkeypatch, capsys):
    inside = tmp_path / "run" / "data"
    shutil.copytree(dataset, inside)
    train(debug_run(inside, tmp_path / "run", *SHORT), device)
    with pytest.raises(UserError, match=rf"--fresh renames .*, but {inside} is in it and in use; give another"):
        train(debug_run(inside, tmp_path / "run", *SHORT), device, fresh=True)
    # nor before the machine is known to be able to do what the new run asks
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))
    with pytest.raises(UserError, match=r"megagpt\.compile=true needs a C\+\+ compiler"):
        train(debug_run(dataset, tmp_path / "run", *SHORT, "megagpt.compile=true"), device, fresh=True)
    skip = ["fp16.enabled=true", "megagpt.guards.spikes.action=skip"]
    with pytest.raises(UserError, match=r"spikes\.action='skip' does not work with fp16"):
        train(debug_run(dataset, tmp_path / "run", *SHORT, *skip), device, fresh=True)
    assert list(tmp_path.glob("run.old*")) == []
    monkeypatch.chdir(tmp_path / "run")
    assert pretrain([*arguments(dataset, "."), "--fresh"]) == 2
    assert f"--fresh renames megagpt.out_dir=., but {tmp_path / 'run'} is in it and in use" in capsys.readouterr().err
    assert committed(tmp_path / "run")


@pytest.mark.process
def test_fresh_gives_the_old_run_its_name_back_if_the_new_one_cannot_start(dataset, device, tmp_path):
    """Building the model, reading its first weights and opening trackers come after the renaming."""
    out_dir, pretrained = tmp_path / "run", tmp_path / "pretrained"
    train(debug_run(dataset, out_dir, *SHORT), device)
    shutil.copytree(out_dir, pretrained)
    [weights] = committed(pretrained)[-1].glob("mp_rank_00_model_states.pt")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    mistakes = {
        f"megagpt.init_from={pretrained}": "is damaged",
        "tensorboard.output_path=/proc/nope": "/proc/nope",
        "csv_monitor.enabled=true csv_monitor.output_path=/proc/nope": "/proc/nope",
    }
    before = contents(tmp_path)
    for mistake, message in mistakes.items():
        with pytest.raises(UserError, match=message):
            train(debug_run(dataset, out_dir, *SHORT, *mistake.split()), device, fresh=True)
        assert contents(tmp_path) == before, mistake
    # its lock is the old run's, and free
    assert train(debug_run(dataset, out_dir, *SHORT, "megagpt.schedule.max_steps=6"), device).step == 6
    train(debug_run(dataset, out_dir, *SHORT), device, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrained", "run", "run.old1"]


def test_an_old_run_is_locked_while_it_may_get_its_name_back(dataset, device, tmp_path):
    train(debug_run(dataset, tmp_path / "run", *SHORT), device)
    lock = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match="no key"), lock, lock.archived_run():  # noqa: PT012
        for name in ("run", "run.old1"):
            with pytest.raises(LockHeldError):
                FileLock(tmp_path / name / LOCK).take()
        raise UserError("no key")
    assert committed(tmp_path / "run")
    with lock:
        with lock.archived_run():
            pass
        FileLock(tmp_path / "run.old1" / LOCK).take()
        with pytest.raises(LockHeldError):
            FileLock(tmp_path / "run" / LOCK).take()
    # another start was faster: it keeps the name
    with pytest.raises(UserError, match="no key"), lock, lock.archived_run():  # noqa: PT012
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        raise UserError("no key")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks; every folder."""
    files = {path for path in folder.rglob("*") if path.name != LOCK}
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.fixture
def steps(dataset, device, tmp_path) -> Path:
    """A run with the steps 2 and 4."""
    train(debug_run(dataset, tmp_path / "run", *SHORT), device)
    return tmp_path / "run"


def test_a_step_that_is_deleted_while_it_is_read_is_replaced_by_another(steps, monkeypatch, capsys):
    """The trainer deletes the step that a reader has just chosen, at the worst moment of each reader."""
    two, four = committed(steps)
    damage_of, record_of = commit.damage_of, commit._record_of

    def deleting(step_dir, *args, **kw):
        if step_dir == four and four.is_dir():
            (four.parent / "best").unlink(missing_ok=True)
            rotation.remove(four)
        return damage_of(step_dir, *args, **kw)

    shutil.copytree(steps, kept := steps.with_name("kept"))
    monkeypatch.setattr(load, "damage_of", deleting)
    assert load_model(steps, torch.device("cpu")).step_dir == two

    def vanishing(step_dir):
        """As DeepSpeed does where some files of a step are deleted already."""
        if step_dir == two:
            return weights_of(step_dir)
        rotation.remove(four)
        raise ValueError("Expected 2 of '*_optim_states.pt' but found 1 files")

    shutil.copytree(kept, steps, dirs_exist_ok=True)
    weights_of = load.consolidated_weights
    monkeypatch.setattr(load, "damage_of", damage_of)
    monkeypatch.setattr(load, "consolidated_weights", vanishing)
    (steps / "checkpoints" / "best").unlink()
    assert megagpt.load(steps).step_dir == two
    with monkeypatch.context() as patch:  # a reader that is slower than every save
        patch.setattr(load, "step_of", lambda path: steps / "checkpoints" / "step_00000009")
        with pytest.raises(UserError, match="has deleted 20 steps while they were read, the last step_00000009; give"):
            megagpt.load(steps)
    monkeypatch.setattr(checkpoints, "damage_of", deleting)
    shutil.copytree(kept, steps, dirs_exist_ok=True)
    assert [row.step for row in checkpoints.listed(steps, hashes=True)] == [2]

    def deleting_record(step_dir):
        if step_dir == four and four.is_dir():
            rotation.remove(four)
        return record_of(step_dir)

    monkeypatch.setattr(commit, "_record_of", deleting_record)
    shutil.copytree(kept, steps, dirs_exist_ok=True)
    assert newest_record(steps).state.step == 2
