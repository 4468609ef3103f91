"""A build that was killed, or lost its disk space or a worker, gives the same bytes when it is run again."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
import pytest
from data_support import run, shard_bytes, write_texts
from distributed import LocalCluster
from support import ROOT

from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.executor.tasks import Tasks, file_of

OPTIONS: dict[str, Any] = {
    "val_fraction": 0.2,
    "vocab_size": 300,
    "sample_bytes": 20_000,
    "dedup": {"method": "near"},
    "subword": {"variants": 1},
    "rules": {"clean": True},
    "shard_tokens": 3000,
}
MANY_UNITS = "import data_tools.readers.work_units; data_tools.readers.work_units.MIN_UNIT_BYTES = 3000"
MANY_WORKERS = "import data_tools.executor.workers; data_tools.executor.workers.SMALL_BYTES = 0"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder, 60)
    write_texts(folder / "copies", 20)
    return folder


@pytest.fixture(scope="module")
@processes.start_here
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of an undisturbed build, and the largest number of its temporary files."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    process = subprocess.Popen(command(texts, out), cwd=ROOT)
    most = max(numbers_of_files(process, out))
    assert process.returncode == 0
    return shard_bytes(out), most


def numbers_of_files(process: subprocess.Popen[bytes], out: Path) -> Iterator[int]:
    """Yield the number of temporary files until the process has ended."""
    while process.poll() is None:
        yield sum(len(files) for _, _, files in os.walk(out / ".build"))  # which forgives what vanishes meanwhile
        time.sleep(0.001)  # a file system has no event that all platforms know


def command(texts: Path, out: Path, *prepare: str) -> list[str]:
    script = "; ".join([MANY_UNITS, *prepare, "import sys; from data_tools.__main__ import main; sys.exit(main())"])
    options = [f"{key}={json.dumps(value)}" for key, value in OPTIONS.items()]
    return [sys.executable, "-c", script, "build", "--input", str(texts), "--out", str(out), "workers=2", *options]


def kill_and_rerun(texts: Path, out: Path, at: int) -> bool:
    """Kill the build at that number of temporary files; returns whether it was still running."""
    process = subprocess.Popen(command(texts, out), cwd=ROOT, stdout=subprocess.DEVNULL)
    for number in numbers_of_files(process, out):
        if number >= at:
            process.kill()
            break
    process.wait()
    killed_in_time = not (out / "manifest.json").exists()
    again = subprocess.run(command(texts, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == (0 if killed_in_time else 2), again.stderr  # 2: it is finished
    return killed_in_time


@pytest.mark.process
@pytest.mark.parametrize("n_kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_build_killed_at_random_moments_ends_in_the_same_bytes(
    n_kills: int, texts: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    expected, most = undisturbed
    rng = random.Random(n_kills)
    killed = 0
    for i in range(n_kills):
        killed += kill_and_rerun(texts, tmp_path / f"{i}", rng.randint(1, most))
        assert shard_bytes(tmp_path / f"{i}") == expected
        assert not (tmp_path / f"{i}" / ".build").exists()
    assert killed >= 0.8 * n_kills  # a few come too late: the last file and the end are one moment


@pytest.mark.process
def test_killed_with_its_worker_processes_it_leaves_no_orphan_and_ends_in_the_same_bytes(
    texts: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(texts, out, MANY_WORKERS), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    await_files(out / ".build" / "extract", 5, lambda: process.poll() is None)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGSTOP)  # it would be finished before the second one, on a busy machine
    second = subprocess.run(command(texts, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (second.returncode, "another build is writing to --out" in second.stderr) == (2, True)
    process.kill()
    process.wait()
    assert workers
    await_true(lambda: not any(is_running(pid) for pid in workers))
    subprocess.run(command(texts, out, MANY_WORKERS), cwd=ROOT, check=True, capture_output=True)
    assert shard_bytes(out) == undisturbed[0]


@pytest.mark.process
def test_a_worker_killed_under_a_running_cluster_costs_nothing_but_time(
    texts: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.readers.work_units.MIN_UNIT_BYTES", 3000)
    out = tmp_path / "out"
    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0
    ) as cluster:
        thread = threading.Thread(target=build, args=([texts], out, BuildConfig(**OPTIONS), cluster.scheduler_address))
        thread.start()
        await_files(out / ".build" / "extract", 3, thread.is_alive)
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
        thread.join()
    assert shard_bytes(out) == undisturbed[0]


@pytest.mark.process
def test_a_full_disk_says_so_keeps_what_is_valid_and_a_rerun_goes_on(
    texts: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        out = disk / "out"
        full = subprocess.run(command(texts, out), cwd=ROOT, capture_output=True, text=True, check=False)
        assert full.returncode == 2, full.stderr
        assert "No space left on device; free disk space and run the same command again\n" in full.stderr
        assert f"What is done is kept in {out / '.build'}: run the command again" in full.stderr
        assert full.stderr.count("\n") == 2
        done = {path.stem for path in (out / ".build").rglob("*.json")}
        assert done
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        reused = subprocess.run(command(texts, out, NAME_REUSED), cwd=ROOT, capture_output=True, text=True, check=True)
        assert done <= set(reused.stderr.split())
        assert shard_bytes(out) == undisturbed[0]
    finally:
        subprocess.run(["umount", disk], check=True)


NAME_REUSED = (
    "import sys, data_tools.executor.tasks as t; is_done = t._is_done; "
    "t._is_done = lambda prefix: is_done(prefix) and (print(prefix.name, file=sys.stderr) or True)"
)


def test_what_is_done_is_never_done_again_and_anything_that_changes_a_task_does_it_anew(tmp_path: Path) -> None:
    ran: list[str] = []

    def write(prefix: Path, name: str, options: dict[str, int]) -> dict[str, str]:
        ran.append(name)
        if name == "bad":
            raise OSError("no such luck")
        file_of(prefix, ".txt").write_text(name)
        return {"name": name}

    def run_all(function: Any, arguments: Any, progress: Any) -> list[Any]:
        return [function(*args) for args in arguments]

    tasks = Tasks(tmp_path, run_all)
    with pytest.raises(OSError, match="no such luck"):
        tasks.run(write, [("a", {"x": 1}), ("bad", {"x": 1}), ("c", {"x": 1})], "testing")
    done = tasks.run(write, [("a", {"x": 1}), ("c", {"x": 1}), ("a", {"x": 1})], "testing")
    assert ran == ["a", "bad", "c"]
    assert [file_of(task.prefix, ".txt").read_text() for task in done] == ["a", "c", "a"]
    tasks.run(write, [("a", {"x": 2})], "testing")
    assert ran == ["a", "bad", "c", "a"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    Tasks(moved, run_all).run(write, [("a", {"x": 2})], "testing")
    assert ran == ["a", "bad", "c", "a"]


@pytest.mark.process
def test_an_edited_input_is_read_again_and_the_rest_is_not(texts: Path, tmp_path: Path) -> None:
    """Stop a build at its last stage, so that its tasks' files remain."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in texts.glob("*.txt"):
        (folder / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    fail = "import data_tools.stages.pipeline as s; s.write_shard.__code__ = (lambda *a: 1 / 0).__code__"
    stopped = subprocess.run(command(folder, out, fail), cwd=ROOT, capture_output=True, check=False)
    assert b"ZeroDivisionError" in stopped.stderr
    before = {path.name for path in (out / ".build" / "extract").glob("*.json")}
    text = (folder / "doc-000.txt").read_text()
    (folder / "doc-000.txt").write_text(text[::-1])  # of the same length, so that the units stay
    subprocess.run(command(folder, out, fail), cwd=ROOT, capture_output=True, check=False)
    after = {path.name for path in (out / ".build" / "extract").glob("*.json")}
    assert len(after - before) == 1
    subprocess.run(command(folder, out), cwd=ROOT, capture_output=True, check=True)
    subprocess.run(command(folder, tmp_path / "fresh"), cwd=ROOT, capture_output=True, check=True)
    assert shard_bytes(out) == shard_bytes(tmp_path / "fresh")


def await_files(folder: Path, n: int, still: Any) -> None:
    await_true(lambda: not still() or len(list(folder.glob("*.json"))) >= n)
    assert still(), "the build ended too early"


def await_true(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)  # a file system has no event that all platforms know


def children_of(pid: int) -> list[int]:
    found = list(_children(pid))
    return found + [inner for child in found for inner in children_of(child)]


def _children(pid: int) -> Iterator[int]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (thread / "children").read_text().split())


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_nothing_is_left_where_a_deleted_file_that_is_open_stays_as_on_nfs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client renames it to .nfsXXXX until it is closed."""
    write_texts(tmp_path / "in", 5)
    unlink = os.unlink

    def unlink_on_nfs(path: str | Path, *, dir_fd: int | None = None) -> None:
        mine = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.path.samestat(mine, os.fstat(int(name))):
                    silly = Path(path).with_name(f".nfs{name}")
                    return os.rename(path, silly, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_on_nfs)
    command = ("build", "--input", tmp_path / "in", "--out", tmp_path / "out", "tokenizer_type=char", "val_fraction=0")
    assert run(*command) == 0
    assert not (tmp_path / "out" / ".build").exists()
    # a build that was killed right after its manifest leaves the folder, which the next one deletes
    (tmp_path / "out" / ".build" / "extract").mkdir(parents=True)
    assert run(*command) == 2
    assert "holds a finished dataset" in capsys.readouterr().err
    assert not (tmp_path / "out" / ".build").exists()
