"""out_dir/train.log: what a run printed, over all its starts, and nothing twice."""

import io
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import DEBUG_RUN, overrides

from megagpt.cli.pretrain import pretrain
from megagpt.errors import OwnRankError, UserError
from megagpt.terminal import GREEN, print_error, show
from megagpt.train.run_log import LOG, RunLog

SHORT = ["megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0", "megagpt.every.eval=0"]


def arguments(dataset, out_dir, *more):
    return ["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *SHORT, *more)]


def test_each_start_appends_a_header_and_the_lines_of_the_terminal(dataset, device, tmp_path, capsys, monkeypatch):
    printed, out_dir = [], tmp_path / "run"
    for steps in (4, 8):
        options = arguments(dataset, out_dir, f"megagpt.schedule.max_steps={steps}", "megagpt.every.sample=4")
        monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *options])
        assert pretrain(options) == 0
        printed += capsys.readouterr().out.splitlines()
    log = (out_dir / LOG).read_text().splitlines()
    headers = [line for line in log if line.startswith("--- ")]
    assert len(headers) == 2
    assert "pretrain.py --deepspeed_config" in headers[1]
    assert "megagpt.schedule.max_steps=8 megagpt.every.sample=4 (megagpt " in headers[1]
    assert [line for line in log if line not in headers] == printed
    assert f"resuming from {out_dir}/checkpoints/step_00000004" in log
    assert "sample at step 8, after '\\n':" in log


def test_an_error_is_in_the_log_as_it_is_printed(dataset, device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megagpt.train.session.Session.log", failing(UserError("step 1 is wrong")))
    assert pretrain(arguments(dataset, tmp_path / "run")) == 2
    assert (tmp_path / "run" / LOG).read_text().splitlines()[-1] == "error: step 1 is wrong"

    monkeypatch.setattr("megagpt.train.session.Session.log", failing(AssertionError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        pretrain(arguments(dataset, tmp_path / "run"))
    log = (tmp_path / "run" / LOG).read_text()
    assert log.count("Traceback (most recent call last):") == 1
    assert log.endswith("AssertionError: a bug\n")


def failing(error):
    def log(*_):
        raise error

    return log


def test_a_fresh_start_begins_a_log_and_the_old_one_moves_with_its_run(dataset, device, tmp_path, capsys):
    options = arguments(dataset, tmp_path / "run")
    assert [pretrain(options), pretrain([*options, "--fresh"])] == [0, 0]
    logs = [(tmp_path / name / LOG).read_text() for name in ("run.old1", "run")]
    assert [log.count("--- ") for log in logs] == [1, 1]
    assert f"the old run is now {tmp_path / 'run.old1'}\n" in logs[1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_adds_its_own_errors_alone(tmp_path, monkeypatch, number):
    """Rank 0 has told of another rank's end already."""
    monkeypatch.setenv("RANK", str(number))
    for error in (OwnRankError("a shard is damaged"), RuntimeError("gloo: Connection closed by peer")):
        with pytest.raises(type(error)):
            failed_in_a_run(tmp_path, error)
    text = (tmp_path / LOG).read_text()
    assert text.count("a shard is damaged") == 1
    assert ("Connection closed" in text, "--- " in text) == (number == 0, number == 0)


def failed_in_a_run(out_dir, error):
    with RunLog() as log:
        log.open(out_dir)
        raise error


def test_a_log_that_standard_output_goes_to_gets_nothing_twice(tmp_path, monkeypatch):
    """As in `megagpt train RUN.json >> runs/mine/train.log`."""
    with (tmp_path / LOG).open("a") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with RunLog() as log:
            show("before the run has its folder")
            log.open(tmp_path)
            show("step 1")
    assert (tmp_path / LOG).read_text() == "before the run has its folder\nstep 1\n"


def test_colors_and_odd_letters_stay_readable_in_the_log(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with RunLog() as log:
        log.open(tmp_path)
        show("best \udcff \u2588", color=GREEN)
        monkeypatch.setenv("NO_COLOR", "1")
        show("plain", color=GREEN)
    assert (tmp_path / LOG).read_text().splitlines()[1:] == ["best \\udcff \u2588", "plain"]
    assert terminal.buffer.getvalue() == b"\x1b[32mbest \\udcff \\u2588\x1b[0m\nplain\n"


@contextmanager
def files_of_at_most(size: int):
    """As a full disk: a write that would make a larger file writes less, or fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_costs_whole_lines_is_told_once_and_ends_nothing(tmp_path, capfd):
    with RunLog() as log:
        log.open(tmp_path)
        with (tmp_path / LOG).open("ab") as file:
            file.write(4096 * b"x\n")  # or the limit would also cut short the files that pytest captures output in
        whole = (tmp_path / LOG).read_bytes()
        with files_of_at_most(len(whole) + 10):
            for text in ("longer than what is left", "again"):
                show(text)
            print_error("short")
        show("there is room again")
    assert (tmp_path / LOG).read_bytes() == whole + b"again\n" + b"there is room again\n"
    out, err = capfd.readouterr()
    assert out == "longer than what is left\nagain\nthere is room again\n"
    assert err.splitlines()[0].endswith(
        f"{LOG} cannot be written (No space left on device); training continues without it"
    )
    assert err.splitlines()[1:] == ["short"]


@pytest.mark.parametrize("mistake", ["train_batch_size=7", "megagpt.data.val=nowhere"])
def test_a_refused_start_leaves_no_log(dataset, device, tmp_path, mistake):
    assert pretrain(arguments(dataset, tmp_path / "run", mistake)) == 2
    assert not (tmp_path / "run").exists()
    assert pretrain(arguments(dataset, tmp_path / "run")) == 0
    log = Path(tmp_path / "run" / LOG).read_text()
    assert pretrain(arguments(dataset, tmp_path / "run", mistake)) == 2
    assert (tmp_path / "run" / LOG).read_text() == log
