"""What commands print: in any encoding, to readers that go away, on full disks; and no error is above a screen."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import DEBUG_RUN, PROGRAMS, ROOT, environment, metric, overrides

import data_tools.__main__
import megagpt.__main__
from megagpt.cli.pretrain import pretrain
from megagpt.errors import OwnRankError, UserError
from megagpt.terminal import SCREEN_CHARACTERS, SCREEN_LINES, exit_code_of, if_encodable, on_a_screen, show

MAIN: dict[str, Callable[[list[str]], int]] = {
    "megagpt": megagpt.__main__.main,
    "data_tools": data_tools.__main__.main,
    "pretrain": pretrain,
}
COMMANDS = [  # that print, with the exit code that each ends with
    ("megagpt plan FILE", 0),
    ("megagpt plan FILE --json", 0),
    ("megagpt lint FILE --effective", 0),
    ("megagpt lint FILE train_batch_size=0", 2),
    ("pretrain --deepspeed_config FILE --sample-report 3", 0),
    ("megagpt slurm FILE --gpus-per-node 2 --dry-run", 0),
    ("megagpt generate RUN --max-tokens 2 --batch 3", 0),
    ("megagpt evaluate RUN --data DATA --tokens 64", 0),
    ("megagpt checkpoints RUN", 0),
    ("data_tools inspect DATA --documents 2", 0),
    ("data_tools inspect RUN --step 1", 0),
    ("data_tools verify DATA", 0),
]


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("terminal") / "run"
    steps = ["megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0"]
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, run, *steps)]) == 0
    return run


def words(command: str, dataset: Path, run: Path) -> list[str]:
    names = {"FILE": [str(DEBUG_RUN), *overrides(dataset, run)], "RUN": [str(run)], "DATA": [str(dataset)]}
    return [word for part in command.split() for word in names.get(part, [part])]


def call(command: str, dataset: Path, run: Path) -> int:
    program, *rest = words(command, dataset, run)
    return MAIN[program](rest)


@contextmanager
def output_to(stream: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


def pipe_without_reader() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize(("command", "code"), COMMANDS)
def test_a_command_whose_reader_is_gone_ends_quietly_with_its_own_code(
    trained, dataset, capfd, monkeypatch, command, code
):
    """As in `... | head`, and `set -o pipefail` still sees what the command found."""
    monkeypatch.chdir(ROOT)
    capfd.readouterr()
    with pipe_without_reader() as gone:
        with output_to(gone, monkeypatch):
            assert call(command, dataset, trained) == code
        gone.flush()  # as Python does at its end: what was buffered must not fail again
    assert complaints(capfd.readouterr().err) == ""


def complaints(said: str) -> str:
    """What a command printed on standard error, without the line in which `generate` tells its settings."""
    return "".join(line for line in said.splitlines(keepends=True) if " on cpu: at most 2 tokens, " not in line)


@pytest.mark.parametrize(("command", "code"), COMMANDS)
def test_a_result_that_cannot_be_written_is_one_message(trained, dataset, capfd, monkeypatch, command, code):
    """Such as `plan ... > file` on a full disk; code 0 would say that the file is whole."""
    monkeypatch.chdir(ROOT)
    capfd.readouterr()
    with Path("/dev/full").open("w") as full:
        with output_to(full, monkeypatch):
            assert call(command, dataset, trained) == 2
        full.flush()
    said = complaints(capfd.readouterr().err)
    assert said == "error: standard output cannot be written: No space left on device; redirect it to another place\n"


@pytest.mark.process
def test_nothing_is_said_at_the_end_of_a_process_whose_reader_is_gone(dataset, trained):
    """Python's own flush of what is buffered included."""
    commands = ["megagpt --help", "data_tools build --help", "data_tools inspect DATA", "megagpt checkpoints RUN"]
    lines = [shlex.join([sys.executable, "-m", *words(command, dataset, trained)]) for command in commands]
    script = "\n".join(f"{line} | true; echo ${{PIPESTATUS[0]}}" for line in lines)
    shell = ["bash", "-c", script]
    done = subprocess.run(shell, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["0"] * len(commands), "")


def test_json_is_json_in_every_encoding(dataset, trained, monkeypatch):
    """A letter that a terminal lacks would be escaped as `\\xe9`, which is no JSON."""
    monkeypatch.setattr("megagpt.tokenizer.tokenizer.Tokenizer.decode", lambda self, ids: "caf\xe9 \U0001f600 \udcff")
    raw = io.BytesIO()
    with output_to(io.TextIOWrapper(raw, encoding="latin-1"), monkeypatch):
        assert call("data_tools inspect DATA --documents 1 --json", dataset, trained) == 0
        assert json.loads(raw.getvalue())["documents"] == ["caf\xe9 \U0001f600 \udcff"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_any_text_is_printed_in_any_encoding(monkeypatch, encoding):
    """A lone surrogate, as in a file name that is not UTF-8, has no form in UTF-8 either."""
    raw = io.BytesIO()
    with output_to(io.TextIOWrapper(raw, encoding=encoding, newline=""), monkeypatch):
        show("a\xe9\u2588\U0001f600\udcff")
        assert if_encodable("\u2588", "#") == ("\u2588" if encoding == "utf-8" else "#")
        shown = raw.getvalue().decode(encoding)
    assert shown.encode(encoding).decode("unicode_escape").startswith("a")
    assert shown.endswith("\\udcff\n")


def fails(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "rank", "code", "said"),
    [
        (UserError("a is wrong"), 0, 2, "error: a is wrong\n"),
        (UserError("a is wrong"), 1, 2, ""),
        (OwnRankError("a is wrong"), 1, 2, "error: a is wrong\n"),
        (KeyboardInterrupt(), 0, 130, "interrupted\n"),
    ],
)
def test_an_error_is_printed_once_and_its_code_returned(capsys, error, rank, code, said):
    assert exit_code_of(fails(error), is_main=lambda: rank == 0) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("text", ["x" * 10**6, "line\n" * 10**5, ("y" * 500 + "\n") * 1000])
def test_a_message_fits_a_screen_and_keeps_its_ends(text):
    shown = on_a_screen(f"corpus.csv has no column{text}; set text_field=NAME")
    assert shown.startswith("corpus.csv has no column")
    assert shown.endswith("; set text_field=NAME")
    assert " more " in shown
    assert shown.count("\n") < SCREEN_LINES
    assert len(shown) <= SCREEN_CHARACTERS + 40


def test_a_message_that_fits_is_left_as_it_is():
    text = "\n".join(["z" * 70] * SCREEN_LINES)
    assert on_a_screen(text) == text


@pytest.mark.process
def test_a_run_whose_terminal_is_closed_trains_to_its_end(dataset, tmp_path):
    """A real terminal, whose end sends SIGHUP, and to which nothing can be written afterwards."""
    master, terminal = os.openpty()
    steps = "megagpt.schedule.max_steps=40"
    command = [sys.executable, PROGRAMS / "in_a_terminal.py", *overrides(dataset, tmp_path / "run", steps)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    with os.fdopen(master, errors="replace") as screen:
        assert any(line.startswith("step") for line in screen)
    assert process.wait(120) == 0
    assert list(metric(tmp_path / "run", "train/loss"))[-1] == 40
    log = (tmp_path / "run" / "train.log").read_text()
    assert "\nfinished at step 40\n" in log  # what nobody could read on the terminal
    assert "\x1b" not in log


def test_a_signal_that_nobody_reads_of_stops_nothing(monkeypatch):
    """Ctrl-C's line goes to standard error, which may be gone like standard output."""
    from megagpt.train.preemption import Preemption

    monkeypatch.setattr("megagpt.train.preemption.CTRL_C", b"stopping")
    before = signal.getsignal(signal.SIGINT)
    kept, (read, write) = os.dup(2), os.pipe()
    os.close(read)
    os.dup2(write, 2)
    try:
        preemption = Preemption(ctrl_c=True)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert preemption.reason == "SIGINT"
    finally:
        os.dup2(kept, 2)
        os.close(write)
        signal.signal(signal.SIGINT, before)
