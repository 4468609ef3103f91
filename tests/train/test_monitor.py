import json
import resource
import time

import pytest
from event_files import board, curves_of, drawn, texts
from support import SCALARS, debug_run, metric
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megagpt.metrics.metrics_file import read_rows
from megagpt.metrics.step_metrics import Stopwatch
from megagpt.train.monitor import Monitor, validation_curve
from megagpt.train.trainer import train
from megagpt.train_state import TrainState


@pytest.fixture(scope="module")
def finished(dataset, device, tmp_path_factory):
    """A run that saved at step 10 and logged until 14, and then went on from 10 to the end."""
    out_dir = tmp_path_factory.mktemp("monitor") / "run"
    options = ["megagpt.sample.max_tokens=8", 'megagpt.sample.prompts=["ab\\nc"]']
    train(debug_run(dataset, out_dir, *options, "megagpt.schedule.max_steps=14"), device)
    for path in (out_dir / "checkpoints").glob("step_00000014"):
        (path / "COMMIT").unlink()  # as if the save had been cut off
    train(debug_run(dataset, out_dir, *options), device)
    return out_dir


def test_tensorboard_holds_the_promised_curves_alone(finished):
    """No MFU among them: a CPU's peak is unknown, and no guess is drawn."""
    shown = board(finished)
    assert curves_of(shown) == SCALARS | {"by_tokens/train/loss", "by_tokens/val/loss"}
    assert all(shown.SummaryMetadata(tag).summary_description for tag in curves_of(shown))


@pytest.mark.parametrize("forgets", [True, False])
def test_a_resumed_run_goes_on_with_one_curve(finished, forgets):
    """Steps 11 to 14 were drawn by the first attempt, which evaluated and sampled at 14, and again by the second."""
    shown = board(finished, forgets=forgets)
    tokens_of_a_step = 8 * 64
    for name, steps in (("train/loss", range(1, 21)), ("val/loss", (10, 20)), ("val/best_loss", (10, 20))):
        assert list(metric(finished, name)) == list(steps)
        assert drawn(shown, name) == pytest.approx(metric(finished, name), rel=1e-6)
        if forgets and name != "val/best_loss":
            by_tokens = {step * tokens_of_a_step: value for step, value in drawn(shown, name).items()}
            assert drawn(shown, f"by_tokens/{name}") == by_tokens
    assert list(texts(shown, "samples")) == [10, 20]
    assert list(texts(shown, "settings/run_file")) == [0]


def test_an_attempt_that_never_saved_leaves_no_second_curve(dataset, device, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megagpt.train.session.save_checkpoint", full_disk)
        with pytest.raises(OSError, match="no space"):
            train(debug_run(dataset, tmp_path), device)
    assert len(drawn(board(tmp_path), "train/loss")) == 10
    train(debug_run(dataset, tmp_path), device)
    shown = board(tmp_path)
    assert list(drawn(shown, "train/loss")) == list(range(1, 21))
    assert list(texts(shown, "settings/run_file")) == [0]
    assert list(texts(shown, "samples")) == [10, 20]


def test_samples_run_file_and_hyperparameters_can_be_read(finished):
    """Those of the newest start: its max_steps is 20, the first one's was 14."""
    shown = board(finished)
    assert '"n_embd": 64' in texts(shown, "settings/run_file")[0]
    assert '"max_steps": 20' in texts(shown, "settings/run_file")[0]
    assert texts(shown, "samples")[10].startswith("**prompt**\n\n    ab\n    c\n\n**continuation**\n\n    ")
    started = HParamsPluginData.FromString(shown.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    values = {name: value.number_value for name, value in started.session_start_info.hparams.items()}
    assert (values["max_steps"], values["n_embd"], values["lr"]) == (20, 64, 0.003)
    assert 8 <= len(values) <= 15


def test_samples_can_be_read_by_a_program_once_for_each_step(finished):
    rows = read_rows(finished / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(10, "ab\nc"), (20, "ab\nc")]
    shown = texts(board(finished), "samples")
    indented = {row["step"]: row["continuation"].replace("\n", "\n    ") for row in rows}
    assert all(shown[step].endswith(f"**continuation**\n\n    {text}") for step, text in indented.items())


def test_evaluating_saving_and_sampling_are_reported_by_themselves(finished):
    """Each in its own row, the save that ends a run too."""
    assert set(metric(finished, "perf/eval_seconds")) == set(metric(finished, "val/loss"))
    assert list(metric(finished, "perf/save_seconds")) == [10, 20]
    assert list(metric(finished, "perf/sample_seconds")) == [10, 20]


def test_throughput_leaves_out_evaluating_saving_and_sampling(finished):
    """A log's tokens over its own seconds of steps and of waiting for data, and over nothing else."""
    speed, data, step = (
        metric(finished, name)
        for name in ("perf/tokens_per_sec", "data/wait_seconds_per_step", "perf/seconds_per_step")
    )
    assert speed == {at: pytest.approx(8 * 64 / (data[at] + step[at])) for at in range(1, 21)}


def test_a_row_that_was_cut_in_half_is_dropped(dataset, tmp_path):
    run = debug_run(dataset, tmp_path, "tensorboard.enabled=false")
    whole = b'{"step": 1, "val/loss": 2.0}\n{"step": 2, "val/loss": 1.5}\n{"step": 3, "val/loss": 1.0}\n{"step": 2'
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    rows = b'{"step": 2, "continuation": "a"}\n{"step": 3, "continuation": "b"}\n{"step": 4, "contin'
    (tmp_path / "samples.jsonl").write_bytes(rows)
    Monitor(run, TrainState(step=2), also=lambda events: None)
    assert metric(tmp_path, "val/loss") == {1: 2.0, 2: 1.5}
    assert (tmp_path / "samples.jsonl").read_bytes() == b'{"step": 2, "continuation": "a"}\n'


def test_other_writers_get_the_same_numbers(dataset, tmp_path):
    events = []
    monitor = Monitor(debug_run(dataset, tmp_path, "tensorboard.enabled=false"), TrainState(), also=events.extend)
    monitor.log(TrainState(step=3, samples_seen=24, tokens_seen=9), {"train/loss": 1.5, "optim/lr": 0.1})
    assert events == [("train/loss", 1.5, 3), ("optim/lr", 0.1, 3)]  # counted in steps
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert abs(row.pop("time") - time.time()) < 60
    assert row == {"step": 3, "tokens_seen": 9, "train/loss": 1.5, "optim/lr": 0.1}


def test_the_log_line_is_for_people(dataset, tmp_path, capsys):
    monitor = Monitor(debug_run(dataset, tmp_path, "tensorboard.enabled=false"), TrainState(), also=lambda events: None)
    metrics = {"train/loss": 3.4124, "optim/lr": 6e-4, "perf/tokens_per_sec": 12345.6, "perf/seconds_per_step": 1.0}
    monitor.log(TrainState(step=7), metrics, eta_seconds=3725)
    line = "step  7/20 | train/loss 3.4124 | lr 6.00e-04 | tokens_per_sec 12,346 | eta 1:02:05\n"
    assert capsys.readouterr().out == line


def test_a_stopwatch_claims_every_second_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr("megagpt.metrics.step_metrics.time.perf_counter", lambda: next(now))
    watch = Stopwatch()  # 0
    with watch.section("data"):  # 1 to 3
        pass
    with watch.section("eval"):  # 4 to 9
        pass
    assert watch.spent("eval") == 5.0
    assert watch.lap() == {"data": 2.0, "eval": 5.0, "step": 3.0}  # at 10
    assert watch.spent("eval") == 0.0
    assert watch.total() == 10.0


def test_the_curve_in_the_terminal_keeps_the_last_point(tmp_path):
    rows = [{"step": i, "val/loss": 5.0 - i / 100} for i in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = validation_curve(tmp_path / "metrics.jsonl").splitlines()
    assert len(lines) <= 14
    assert lines[0] == "    step val/loss (bars from 4.0000 to 4.9900)"
    assert lines[1].split()[:2] == ["1", "4.9900"]
    assert lines[-1].split() == ["100", "4.0000", "█"]
    rows = rows[:2]  # too few for bars, the shorter of which would look like nothing
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert validation_curve(tmp_path / "metrics.jsonl").splitlines() == [
        "    step val/loss",
        "         1   4.9900",
        "         2   4.9800",
    ]


def test_a_disk_that_takes_no_more_costs_numbers_and_not_the_run(dataset, tmp_path, capsys):
    """A row is there whole or not at all, so that those after it can be read."""
    run = debug_run(dataset, tmp_path, "tensorboard.enabled=false")
    monitor = Monitor(run, TrainState(), also=lambda events: None)
    file, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 5):
        if step in (2, 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))
        try:
            monitor.log(TrainState(step=step), {"train/loss": 0.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(metric(tmp_path, "train/loss")) == [1, 4]
    assert capsys.readouterr().out.count("metrics cannot be written to metrics.jsonl (") == 1
