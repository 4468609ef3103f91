"""Each number reaches a tracker once, over killed starts, outages and copies of a run's folder.

`Ledger` is a service of the tests' own, which can be slow or down; the real ones are tested where they are installed.
"""

import csv
import json
import shutil
import threading
import time
from bisect import bisect_left
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import pytest
from support import debug_run, metric

from megagpt.errors import UserError
from megagpt.metrics import trackers
from megagpt.metrics.metrics_file import append_row, keep_up_to, new_row, read_rows
from megagpt.metrics.trackers import close_feeds, open_feeds
from megagpt.metrics.wandb_file import offline_rows
from megagpt.train.monitor import Monitor
from megagpt.train.trainer import train
from megagpt.train_state import TrainState

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed (pip install mlflow)")
TOKENS = 64  # of a step


class Ledger:
    """Remembers what it gets: run -> name -> steps. While `down` it takes nothing; while not `open` it waits.

    The next request loses its answer after `loses_answer_after` values.
    """

    name = "the ledger"
    runs: ClassVar[dict[str, dict[str, list[int]]]] = {}
    down, open, asked, refused = False, threading.Event(), threading.Event(), threading.Event()
    took: SimpleQueue[str] = SimpleQueue()
    loses_answer_after: ClassVar[list[int]] = []
    outcomes: ClassVar[list[str]] = []

    def __init__(self, run, run_id):
        if self.down:
            raise ConnectionError("the ledger is closed")
        self.id = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.id, {})

    def send(self, rows):
        self.asked.set()
        self.open.wait(60)
        if self.down:
            self.refused.set()
            raise ConnectionError("the ledger is closed")
        values = [(row["step"], name) for row, values in rows for name in values]
        taken = self.loses_answer_after.pop() if self.loses_answer_after else None
        for step, name in values[:taken]:
            self.runs[self.id].setdefault(name, []).append(step)
            self.took.put(name)
        if taken is not None:
            self.refused.set()
            raise ConnectionError("the ledger is closed")

    def taken(self, names):
        if self.down:
            raise ConnectionError("the ledger is closed")
        return {name: max(steps) for name, steps in self.runs[self.id].items()}

    def close(self, outcome):
        self.outcomes.append(outcome)


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Ledger)
    monkeypatch.setattr(Ledger, "runs", {})
    monkeypatch.setattr(Ledger, "down", False)
    monkeypatch.setattr(Ledger, "took", SimpleQueue())
    monkeypatch.setattr(Ledger, "outcomes", [])
    Ledger.open.set()
    Ledger.refused.clear()
    return Ledger


@pytest.fixture
def run(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    return debug_run(dataset, tmp_path / "run", "megagpt.mlflow.enabled=true")


class Start:
    """What a start of a run does: it resumes from a step, logs each later one, and evaluates every fifth."""

    def __init__(self, run, step: int) -> None:
        self.file = run.megagpt.out_dir / "metrics.jsonl"
        logged = read_rows(self.file)
        [self.feed] = open_feeds(run, [row for row in logged if row["step"] <= step], logged) or [None]
        keep_up_to(self.file, step)

    def log(self, steps, *, evaluates: bool = True) -> None:
        for step in steps:
            self.row(step, {"train/loss": 1.0})
            if evaluates and step % 5 == 0:
                self.row(step, {"val/loss": 2.0})

    def row(self, step: int, metrics: dict[str, float]) -> None:
        row = new_row(step, TOKENS * step, metrics)
        append_row(self.file, row)
        if self.feed:
            self.feed.log(row)


def killed(start: Start) -> None:
    """End a start after its rows were sent, and without its last words."""
    start.feed._record.write = lambda: None
    close_feeds([start.feed], "finished")


def test_steps_that_come_again_after_a_kill_are_sent_once(ledger, run):
    first = Start(run, 0)
    first.log(range(1, 14))
    first.row(14, {"train/loss": 1.0})
    first.row(15, {"train/loss": 1.0})  # and it was killed while it evaluated
    killed(first)
    for kill in (12, 15, 20):
        start = Start(run, 10)
        start.log(range(11, kill + 1))
        killed(start)
    assert ledger.runs == {
        "run0": {
            "train/loss": list(range(1, 21)),
            "tokens_seen": list(range(1, 21)),
            "val/loss": [5, 10, 15, 20],
        }
    }


def test_what_a_service_did_not_take_is_sent_when_it_is_back(ledger, run, capsys):
    start = Start(run, 0)
    start.log(range(1, 6))
    while ledger.took.get(timeout=60) != "val/loss":
        pass
    ledger.down = True
    start.log(range(6, 9))
    close_feeds([start.feed], "finished")
    assert "metrics cannot be sent to the ledger (the ledger is closed); they are sent later" in capsys.readouterr().out
    start = Start(run, 8)  # the service refuses the run that it knows: training goes on without it
    assert start.feed is None
    start.log(range(9, 11))
    assert "the ledger cannot be used (the ledger is closed); training continues without it" in capsys.readouterr().out
    ledger.down = False
    start = Start(run, 10)
    start.log([11])
    close_feeds([start.feed], "finished")
    assert ledger.runs["run0"]["train/loss"] == list(range(1, 12))
    assert ledger.runs["run0"]["val/loss"] == [5, 10]


def test_a_service_that_is_back_in_the_same_start_gets_all(ledger, run, capsys):
    start = Start(run, 0)
    ledger.down = True
    start.log([1, 2])
    assert ledger.refused.wait(60)
    ledger.down = False
    start.log([3])
    close_feeds([start.feed], "finished")
    assert ledger.runs["run0"]["train/loss"] == [1, 2, 3]
    told = "metrics cannot be sent to the ledger (the ledger is closed); they are sent later\n"
    assert capsys.readouterr().out == told + "the ledger takes metrics again\n"


@pytest.mark.parametrize("values", [0, 201, 400])
def test_a_request_that_fails_half_way_or_loses_its_answer_sends_no_step_twice(ledger, run, values, capsys):
    for step in range(1, 301):
        append_row(run.megagpt.out_dir / "metrics.jsonl", new_row(step, TOKENS * step, {"train/loss": 1.0}))
    ledger.loses_answer_after.append(values)
    start = Start(run, 300)
    assert ledger.refused.wait(60)
    start.log([301])
    close_feeds([start.feed], "finished")
    assert ledger.runs["run0"] == {name: list(range(1, 302)) for name in ("tokens_seen", "train/loss")}
    assert "the ledger takes metrics again" in capsys.readouterr().out


def test_what_a_start_was_still_sending_at_its_end_is_sent_by_the_next(ledger, run, monkeypatch):
    stuck = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "CLOSE_SECONDS", 0.01)
        patch.setattr(ledger, "open", stuck)
        patch.setattr(ledger, "asked", threading.Event())
        first = Start(run, 0)
        first.log(range(1, 11))
        assert ledger.asked.wait(60)
        close_feeds([first.feed], "stopped")
    second = Start(run, 10)
    second.log([11])
    close_feeds([second.feed], "finished")
    assert ledger.runs["run0"]["train/loss"] == list(range(1, 12))
    ledger.down = True  # so that the first takes its end
    stuck.set()
    first.feed._thread.join()


def test_the_trackers_of_a_run_share_the_time_to_close(ledger, run, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    ledger.open.clear()
    feeds = [Start(run, 0).feed for _ in range(5)]
    for feed in feeds:
        feed.log(new_row(1, TOKENS, {"train/loss": 1.0}))
    began = time.monotonic()
    close_feeds(feeds, "finished")
    assert 0.2 <= time.monotonic() - began < 0.6
    ledger.open.set()
    for feed in feeds:
        feed._thread.join()


def test_a_long_run_is_sent_in_parts_that_are_noted_one_by_one(ledger, run, monkeypatch):
    parts, send = SimpleQueue(), ledger.send
    monkeypatch.setattr(ledger, "send", lambda self, rows: (parts.put(len(rows)), send(self, rows)))
    for step in range(1, 251):
        append_row(run.megagpt.out_dir / "metrics.jsonl", new_row(step, TOKENS * step, {"train/loss": 1.0}))
    noted = []
    monkeypatch.setattr(trackers.Record, "write", lambda self: noted.append(self.sent.get("train/loss")))
    start = Start(run, 250)
    close_feeds([start.feed], "finished")
    assert noted == [None, 100, 200, 250]
    assert [parts.get() for _ in range(3)] == [100, 100, 50]


def test_a_tracker_that_is_switched_on_later_gets_the_run_from_its_beginning(ledger, run):
    for row in (new_row(step, TOKENS * step, {"train/loss": 1.0}) for step in range(1, 9)):
        append_row(run.megagpt.out_dir / "metrics.jsonl", row)
    start = Start(run, 6)
    start.log([7])
    close_feeds([start.feed], "finished")
    assert ledger.runs["run0"]["train/loss"] == list(range(1, 8))


def test_a_copy_of_a_runs_folder_is_another_run(ledger, run, dataset, tmp_path):
    start = Start(run, 0)
    start.log([1, 2])
    close_feeds([start.feed], "finished")
    shutil.copytree(run.megagpt.out_dir, tmp_path / "copy")
    start = Start(debug_run(dataset, tmp_path / "copy", "megagpt.mlflow.enabled=true"), 2)
    start.log([3])
    close_feeds([start.feed], "finished")
    assert ledger.runs["run0"]["train/loss"] == [1, 2]
    assert ledger.runs["run1"]["train/loss"] == [1, 2, 3]


def test_a_slow_service_delays_no_step_and_the_end_for_a_limited_time(ledger, run, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.01)
    ledger.open.clear()
    start = Start(run, 0)
    start.log(range(1, 4))  # returns
    close_feeds([start.feed], "finished")
    assert "the ledger did not take the last metrics in 0 s" in capsys.readouterr().out
    ledger.open.set()
    start.feed._thread.join()
    assert ledger.runs["run0"]["train/loss"] == [1, 2, 3]


def test_a_new_run_that_its_tracker_refuses_is_one_message(ledger, run):
    ledger.down = True
    with pytest.raises(UserError) as refused:
        Start(run, 0)
    assert str(refused.value) == (
        "megagpt.mlflow.enabled=true: the ledger cannot be used (the ledger is closed); fix that, or set "
        "megagpt.mlflow.enabled=false"
    )
    assert not list(run.megagpt.out_dir.iterdir())


def test_a_tracker_that_refuses_closes_those_that_were_open(ledger, run, dataset, monkeypatch):
    both = debug_run(dataset, run.megagpt.out_dir, "megagpt.mlflow.enabled=true", "wandb.enabled=true")

    class Closed(Ledger):
        down = True

    monkeypatch.setattr(trackers, "TRACKERS", {"mlflow": Ledger, "wandb": Closed})
    with pytest.raises(UserError, match=r"^wandb\.enabled=true: the ledger cannot be used"):
        open_feeds(both, [], [])
    assert ledger.outcomes == ["failed"]


def test_a_monitor_that_cannot_open_its_files_closes_its_trackers(ledger, run, dataset, tmp_path):
    (tmp_path / "file").touch()
    options = ("megagpt.mlflow.enabled=true", f"tensorboard.output_path={tmp_path}/file")
    with pytest.raises(UserError, match="Not a directory"):
        Monitor(debug_run(dataset, run.megagpt.out_dir, *options), TrainState(), also=lambda events: None)
    assert ledger.outcomes == ["failed"]


def test_a_tracker_is_told_how_a_start_ended(ledger, dataset, device, tmp_path, monkeypatch):
    options = ["megagpt.mlflow.enabled=true", "megagpt.data.val_tokens=128", "megagpt.every.sample=0"]
    run = debug_run(dataset, tmp_path / "run", *options, 'megagpt.schedule={"max_steps": 2}')
    train(run, device, stop_at=1)
    with monkeypatch.context() as patch:
        patch.setattr("megagpt.train.session.save_checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run, device)
    train(run, device)
    assert ledger.outcomes == ["stopped", "failed", "finished"]


def test_csv_files_hold_what_metrics_jsonl_holds_over_resumes(dataset, device, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["csv_monitor.enabled=true", "megagpt.data.val_tokens=128", "megagpt.every.sample=0"]
    short = 'megagpt.schedule={"max_steps": 3}'
    train(debug_run(dataset, tmp_path / "run", *options, short, "megagpt.every.save=2"), device)
    (tmp_path / "run" / "checkpoints" / "step_00000003" / "COMMIT").unlink()  # as if the save had been cut off
    train(debug_run(dataset, tmp_path / "run", *options, short), device)
    assert not list((tmp_path / "here").iterdir())
    for name in ("train/loss", "val/loss", "perf/save_seconds"):
        head, *rows = csv.reader((tmp_path / "run" / "csv" / f"{name.replace('/', '_')}.csv").open())
        assert head == ["step", name, "tokens_seen"]
        assert {int(step): float(value) for step, value, _ in rows} == metric(tmp_path / "run", name)
        assert [int(tokens) for *_, tokens in rows] == [8 * 64 * int(step) for step, *_ in rows]


def _end_of_row(file: Path, n: int) -> int:
    """How many bytes of an offline file hold its first n rows."""
    whole = file.read_bytes()

    def rows(size: int) -> int:
        file.write_bytes(whole[:size])
        return len(list(offline_rows(file)))

    size = bisect_left(range(len(whole)), n, key=rows)
    file.write_bytes(whole)
    return size


@needs_wandb
@pytest.mark.process
def test_weights_and_biases_has_our_steps_once_over_a_resume(dataset, device, tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_API_KEY", "planted" * 6)):
        monkeypatch.setenv(name, value)
    options = ["wandb.enabled=true", "megagpt.data.val_tokens=128", "megagpt.every.sample=0", "megagpt.every.save=2"]
    short = 'megagpt.schedule={"max_steps": %d}'
    out_dir = tmp_path / "run"
    train(debug_run(dataset, out_dir, *options, short % 3), device)
    (out_dir / "checkpoints" / "step_00000003" / "COMMIT").unlink()
    # as after a kill, when the newest rows are in no file yet
    [file] = (out_dir / "wandb").glob("offline-run-*/*.wandb")
    rows = list(offline_rows(file))
    assert [row["_step"] for row in rows] == [1, 2, 3]
    file.write_bytes(file.read_bytes()[: _end_of_row(file, 1) + 5])
    train(debug_run(dataset, out_dir, *options, short % 5), device)
    folders = sorted((out_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one run
    rows = [row for folder in folders for file in folder.glob("*.wandb") for row in offline_rows(file)]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["train/loss"] == metric(out_dir, "train/loss")[row["_step"]]
        assert row["tokens_seen"] == 8 * 64 * row["_step"]
    files = [path.read_bytes() for path in out_dir.rglob("*") if path.is_file()]
    assert not any(b"planted" in content for content in files)


@needs_mlflow
def test_mlflow_has_our_steps_once_over_a_resume(dataset, device, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options = ["megagpt.mlflow.enabled=true", "megagpt.data.val_tokens=128", "megagpt.every.sample=0"]
    out_dir = tmp_path / "run"
    run = debug_run(dataset, out_dir, *options, 'megagpt.schedule={"max_steps": 5}', "megagpt.every.save=2")
    train(run, device, stop_at=3)
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("megagpt").experiment_id])
    assert found.info.status == "KILLED"
    (out_dir / "checkpoints" / "step_00000003" / "COMMIT").unlink()
    # as a start that was killed left it
    record = {"id": found.info.run_id, "folder": str(out_dir), "sent": {}, "exact": False}
    (out_dir / "tracker.json").write_text(json.dumps({"mlflow": record}))
    append_row(out_dir / "metrics.jsonl", new_row(2, 8 * TOKENS * 2, {"val/loss": 6.0}))  # which it had not sent
    train(run, device)
    [found] = client.search_runs([client.get_experiment_by_name("megagpt").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params["n_embd"]) == ("run", "FINISHED", "64")
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == [2, 5]
    for name in ("train/loss", "tokens_seen"):
        assert [point.step for point in client.get_metric_history(found.info.run_id, name)] == [1, 2, 3, 4, 5]
