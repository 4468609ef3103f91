"""The first lines of a run, its notes, and the texts that it shows: numbers worked out by hand."""

import os
import re
import sys

import pytest
from support import debug_run, metric

from megagpt.config.doubling import doubling
from megagpt.distributed.process_group import progress_bar
from megagpt.metrics.step_metrics import Pace
from megagpt.train.opening import notes
from megagpt.train.preflight import prepare
from megagpt.train.samples import sample_lines
from megagpt.train.trainer import train

LONG = "megagpt.schedule.max_steps"


def test_a_run_begins_with_its_sizes_and_where_to_look(dataset, device, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"{LONG}=1", "megagpt.schedule.warmup_steps=0", "megagpt.every.eval=0", "tensorboard.enabled=true"]
    state = train(debug_run(dataset, "runs/x y", *options), device)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("runs/x y: ")
    assert "(2 layers, 64 wide, vocabulary " in lines[0]
    assert lines[0].endswith("fp32 on the CPU")
    assert lines[1].endswith("global batch 8 = micro-batch 4 x accumulation 2 x 1 rank")
    assert lines[2].startswith("  1 step of 512 tokens: 512 tokens, ")
    assert lines[3] == "  log: runs/x y/train.log; curves: tensorboard --logdir runs"
    assert state.tokens_seen == 512
    epochs = float(lines[2].split(", ")[-2].removesuffix(" epochs"))
    assert epochs == pytest.approx(512 / 64_395, rel=0.1)
    assert metric(tmp_path / "runs/x y", "train/loss").keys() == {1}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([f"{LONG}=20"], []),
        # 64,395 training tokens, 512 in a step: 500 steps are 3.98 epochs, and 5,000 are 39.8.
        ([f"{LONG}=500"], []),
        (
            [f"{LONG}=5000"],
            ["is read 40 times; after about 4 times repeated text teaches little more (Muennighoff et "],
        ),
        (
            [f"{LONG}=1000000"],
            [
                "is read 7,960 times; ",
                "note: 3,976 tokens per parameter; about 20 make the most of the same computing ",
            ],
        ),
        ([f"{LONG}=1000", "train_batch_size=4", "megagpt.model.n_embd=512"], ["note: 0.0"]),
    ],
)
def test_a_note_has_the_number_and_what_to_set(dataset, device, tmp_path, more, expected):
    found = notes(prepare(debug_run(dataset, tmp_path / "run", *more), device, fresh=False))
    assert len(found) == len(expected), found
    assert all(part in line for part, line in zip(expected, found, strict=True)), found


def test_the_steps_that_a_note_names_are_four_epochs(dataset, device, tmp_path):
    [note] = notes(prepare(debug_run(dataset, tmp_path / "run", f"{LONG}=5000"), device, fresh=False))
    steps = note.rpartition("=")[2]
    setup = prepare(debug_run(dataset, tmp_path / "run", f"{LONG}={steps}"), device, fresh=False)
    [epochs] = setup.training_set.epochs(int(steps) * 8)
    assert epochs == pytest.approx(4, abs=0.01)
    assert notes(setup) == []


def test_samples_are_a_few_lines_that_a_terminal_only_shows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "def f(x):\n\n\treturn \x1b[31mred\x1b[0m \u202eback\r\n" + "y" * 100 + "\na\nb\nc\n"
    lines = sample_lines([("im\nport ", text), ("", ""), ("p", "q"), ("r", "s")], 5)
    assert lines == [
        "sample at step 5, after 'im\\nport ':",
        "  | def f(x):",
        "  |     return \\x1b[31mred\\x1b[0m ...",
        "  | " + "y" * 30 + "...",
        "  | a",
        "  | ...",
        "sample at step 5, a new document:",
        "  | (it ended at once)",
        "sample at step 5, after 'p':",
        "  | q",
        "... and 1 more text",
    ]
    assert max(map(len, lines[1:5])) < 40


@pytest.mark.parametrize(("is_terminal", "seconds", "drawn"), [(True, 2, True), (True, 0, False), (False, 2, False)])
def test_a_bar_is_drawn_on_a_terminal_after_a_second_and_removed(monkeypatch, is_terminal, seconds, drawn):
    """A terminal whose size nobody has set, as of `docker run -t`."""
    read, write = os.openpty() if is_terminal else os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with progress_bar("evaluating", total=4, unit="batch") as bar:
                bar.start_t = getattr(bar, "start_t", 0) - seconds  # as if it had begun earlier
                bar.last_print_t = bar.start_t
                bar.update()
        print("end", file=stream, flush=True)
        shown = reader.readline().decode()
    assert ("evaluating:  25%" in shown) == drawn
    assert re.fullmatch(r".*\r +\rend\r?\n" if drawn else r"end\r?\n", shown)


@pytest.mark.parametrize(
    ("every", "seconds", "ramp", "expected"),
    [
        (10, 8.0, 0, "a step takes about 8.0 s: 2.2 hours for the 998 that are left, and 64 s to the next line"),
        (10, 7.0, 0, ""),
        (10, 8.0, 500, "a step takes about 8.0 s: 3.3 hours for the 998 that are left, and 64 s to the next line"),
        (10, 7.0, 4, "a step takes about 7.0 s: 3.9 hours for the 998 that are left, and 98 s to the next line"),
        (0, 0.1, 0, "a step takes about 100 ms: 100 s for the 998 that are left, and 100 s to the next line"),
        (0, 0.01, 0, ""),
    ],
)
def test_the_time_that_a_run_takes_is_told_where_the_first_line_is_far_away(
    monkeypatch, every, seconds, ramp, expected
):
    """With a ramp, the steps after it have twice the samples."""
    now = [0.0]
    monkeypatch.setattr("megagpt.metrics.step_metrics.time.perf_counter", lambda: now[0])
    pace, told = Pace(0, 1000, every, doubling(ramp, 4, 8)), []
    for step in range(1, 5):
        now[0] += 500.0 if step == 1 else seconds  # the first step compiles
        told.append(pace(step))
    assert told == ["", expected, "", ""]
