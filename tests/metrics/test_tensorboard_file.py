"""Event files over versions, folders and full disks; tests/cluster/test_tensorboard.py looks at them in a browser."""

import json
import os
import resource
import shutil
import time

import pytest
from event_files import board, curves_of, drawn, texts
from support import debug_run, metric
from torch.utils.tensorboard import SummaryWriter

from megagpt.errors import UserError
from megagpt.metrics.metrics_file import new_row
from megagpt.metrics.tensorboard_file import PREFIX, TensorBoardFile, events_folder
from megagpt.train.monitor import Monitor
from megagpt.train_state import TrainState


def monitor(run, step, **more) -> Monitor:
    return Monitor(run, TrainState(step=step, tokens_seen=64 * step), also=lambda events: None, **more)


@pytest.fixture
def old_run(dataset, tmp_path):
    """A run of an older megagpt that logged 12 steps and saved the 10th: other names, in a folder `tensorboard`."""
    run = debug_run(dataset, tmp_path / "run")
    writer = SummaryWriter(str(tmp_path / "run" / "tensorboard"))
    rows = []
    for step in range(1, 13):
        metrics = {"loss/train": 5.0 - step / 10, "lr": 0.5, "seconds/step": 3.0, "cluster/data_slowest_rank": 1.0}
        metrics |= {"loss/val": 4.0} if step in (5, 11) else {}
        rows.append({"step": step, "tokens_seen": 64 * step, **metrics})
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if step in (5, 11):
            writer.add_text("samples", f"text of {step}", step)
    writer.close()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize("forgets", [True, False])
def test_a_run_of_an_older_version_has_its_curves_under_todays_names(old_run, forgets):
    monitor(old_run, 10).log(
        TrainState(step=11, tokens_seen=704), {"train/loss": 3.5, "cluster/data_slowest_rank": 0.0}
    )
    folder = old_run.megagpt.out_dir / "tensorboard"
    shown = board(folder, forgets=forgets)
    losses = {step: pytest.approx(5.0 - step / 10) for step in range(1, 11)} | {11: 3.5}
    assert drawn(shown, "train/loss") == losses
    assert drawn(shown, "by_tokens/train/loss") == {64 * step: loss for step, loss in losses.items()}
    assert drawn(shown, "val/loss") == {5: 4.0}
    assert drawn(shown, "perf/seconds_per_step") == dict.fromkeys(range(1, 11), 3.0)
    assert drawn(shown, "cluster/data_slowest_rank") == {**dict.fromkeys(range(1, 11), 1.0), 11: 0.0}
    assert list(texts(shown, "samples")) == [5]
    assert curves_of(shown).isdisjoint(("loss/train", "loss/val", "lr", "seconds/step"))
    assert not list(old_run.megagpt.out_dir.glob(f"{PREFIX}*"))


def test_curves_that_metrics_jsonl_lost_stay_under_their_former_names(old_run):
    (old_run.megagpt.out_dir / "metrics.jsonl").unlink()
    monitor(old_run, 10)
    assert "loss/train" in curves_of(board(old_run.megagpt.out_dir / "tensorboard"))


def test_tensorboard_that_is_switched_on_later_draws_the_run_from_its_beginning(dataset, tmp_path):
    first = monitor(debug_run(dataset, tmp_path / "run", "tensorboard.enabled=false"), 0)
    for step in (1, 2, 3):
        first.log(TrainState(step=step, tokens_seen=64 * step), {"train/loss": 1.0 / step})
    monitor(debug_run(dataset, tmp_path / "run"), 2)
    assert drawn(board(tmp_path / "run"), "train/loss") == {1: 1.0, 2: 0.5}


@pytest.mark.parametrize("forgets", [True, False])
def test_tensorboard_that_was_off_for_a_start_has_no_hole_and_no_point_twice(dataset, tmp_path, forgets):
    for start, on in ((0, "true"), (5, "false"), (10, "true"), (15, "true")):
        watched = monitor(debug_run(dataset, tmp_path / "run", f"tensorboard.enabled={on}"), start)
        for step in range(start + 1, start + 6):
            watched.log(TrainState(step=step, tokens_seen=64 * step), {"train/loss": 1.0 / step})
        watched.samples([("a", "b")], start + 5)
    shown = board(tmp_path / "run", forgets=forgets)
    losses = {step: pytest.approx(1.0 / step) for step in range(1, 21)}
    assert drawn(shown, "train/loss") == losses
    assert list(drawn(shown, "train/loss")) == list(losses)
    if forgets:
        assert drawn(shown, "by_tokens/train/loss") == {64 * step: loss for step, loss in losses.items()}
    assert list(texts(shown, "samples")) == [5, 15, 20]


@pytest.mark.parametrize("section", ["tensorboard", "csv_monitor"])
def test_a_folder_of_curves_that_cannot_be_made_is_reported_by_its_key(dataset, tmp_path, section):
    (tmp_path / "file").touch()
    run = debug_run(dataset, tmp_path / "run", f"{section}.enabled=true", f"{section}.output_path={tmp_path}/file")
    with pytest.raises(UserError) as refused:
        monitor(run, 0)
    folder = tmp_path / "file" / "run"
    assert str(refused.value) == (
        f"{section}.output_path={tmp_path}/file cannot be written: [Errno 20] Not a directory: '{folder}'; free disk "
        "space, allow writing there, or set another folder"
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "name").touch()
    run = debug_run(dataset, tmp_path / "run", f"{section}.enabled=true", f"{section}.job_name=name")
    with pytest.raises(UserError, match=rf"^{section}\.job_name=name cannot be written: .*File exists"):
        monitor(run, 0)


def test_the_description_comes_first_and_a_host_whose_clock_is_behind_comes_last(dataset, tmp_path):
    run = debug_run(dataset, tmp_path / "run")
    monitor(run, 0)
    [file] = [path for path in (tmp_path / "run").glob(f"{PREFIX}*") if not path.name.endswith(".run")]
    ahead = file.rename(file.with_name(f"{PREFIX}{time.time() + 900:017.6f}.h2.1"))
    monitor(run, 1)
    names = sorted(path.name for path in (tmp_path / "run").glob(f"{PREFIX}*"))
    assert names[0] == f"{PREFIX}0000000000.run"
    assert names[1] == ahead.name
    assert len(names) == 3


def test_the_folder_is_named_by_the_run(dataset, tmp_path, monkeypatch):
    def folder(*options: str, resumed: bool = False) -> str:
        run = debug_run(dataset, tmp_path / "runs" / "a", *options)
        return os.path.relpath(events_folder(run, resumed=resumed), tmp_path)

    elsewhere = f"tensorboard.output_path={tmp_path}/logs"
    assert folder() == "runs/a"
    assert folder("tensorboard.job_name=x") == "runs/a/x"
    assert folder(elsewhere) == "logs/a"
    assert folder(elsewhere, "tensorboard.job_name=x") == "logs/x"
    # of an older megagpt
    (tmp_path / "logs" / "tensorboard").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "tensorboard").mkdir(parents=True)
    assert folder() == "runs/a/tensorboard"
    assert folder(elsewhere) == "logs/a"
    assert folder(elsewhere, resumed=True) == "logs/tensorboard"
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert folder("megagpt.out_dir=.", elsewhere) == "logs/a"


def test_runs_that_share_a_folder_keep_each_others_points(dataset, tmp_path):
    shared = [f"tensorboard.output_path={tmp_path}/logs", "tensorboard.job_name=all"]
    monitor(debug_run(dataset, tmp_path / "a", *shared), 0).log(TrainState(step=9), {"train/loss": 1.0})
    monitor(debug_run(dataset, tmp_path / "b", *shared), 0)
    assert drawn(board(tmp_path / "logs" / "all", forgets=False), "train/loss") == {9: 1.0}


def test_an_event_file_that_was_cut_short_goes_on_with_whole_events(dataset, tmp_path):
    run = debug_run(dataset, tmp_path / "run")
    first = monitor(run, 0)
    for step in (1, 2, 3):
        first.log(TrainState(step=step, tokens_seen=64 * step), {"train/loss": 1.0, "optim/lr": 1.0})
    [file] = [path for path in (tmp_path / "run").glob(f"{PREFIX}*") if not path.name.endswith(".run")]
    whole = file.read_bytes()
    for cut in (1, 40, len(whole) - 5):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "run", folder)
        (folder / file.name).write_bytes(whole[:-cut])
        monitor(debug_run(dataset, folder), 2).log(TrainState(step=3, tokens_seen=192), {"train/loss": 2.0})
        points = drawn(board(folder, forgets=False), "train/loss")
        assert points.items() <= {1: 1.0, 2: 1.0, 3: 2.0}.items()
        assert points[3] == 2.0


def test_a_disk_that_takes_no_more_costs_points_and_not_the_run(dataset, tmp_path, capsys):
    """An event is there whole or not at all, so that those after it can be read."""
    watched, limits = monitor(debug_run(dataset, tmp_path), 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    [file] = [path for path in tmp_path.glob(f"{PREFIX}*") if not path.name.endswith(".run")]
    for step in (1, 2, 3, 4):
        if step in (2, 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))
        try:
            watched.log(TrainState(step=step), {"val/perplexity": 0.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(drawn(board(tmp_path), "val/perplexity")) == [1, 4]
    assert capsys.readouterr().out.count("metrics cannot be written to TensorBoard (") == 1
    monitor(debug_run(dataset, tmp_path), 4)  # the next start draws what metrics.jsonl, a smaller file, could take
    assert list(drawn(board(tmp_path), "val/perplexity")) == list(metric(tmp_path, "val/perplexity")) == [1, 2, 4]


def test_a_metric_that_is_not_finite_is_left_out(dataset, tmp_path):
    file = TensorBoardFile(debug_run(dataset, tmp_path), 0, [])
    file.log(new_row(1, 64, {"val/loss": float("nan"), "val/best_loss": float("inf"), "perf/eval_seconds": 1.0}))
    assert curves_of(board(tmp_path)) == {"perf/eval_seconds"}


def test_a_sample_cannot_act_as_markdown(dataset, tmp_path):
    TensorBoardFile(debug_run(dataset, tmp_path), 0, []).samples([("# a\n\n* b", "<b>\n---"), ("", "c")], 3)
    expected = "**prompt**\n\n    # a\n    \n    * b\n\n**continuation**\n\n    <b>\n    ---"
    assert texts(board(tmp_path), "samples") == {3: expected + "\n\n---\n\n**continuation**\n\n    c"}
