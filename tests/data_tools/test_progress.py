"""Progress: bars that count what tasks read, on terminals of any width, and lines in a log."""

import fcntl
import gzip
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from functools import partial
from pathlib import Path

import pytest
from data_support import document
from hypothesis import given
from hypothesis import strategies as st

import data_tools.executor.progress as executor_progress
from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.executor.progress import Progress, advance, listening, note
from data_tools.executor.tasks import Tasks
from data_tools.executor.workers import _run_here


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2000), st.booleans())),
    st.integers(0, 100),
)
def test_progress_only_grows_and_ends_at_the_total_whatever_tasks_report(
    sizes: list[int], reports: list[tuple[int, int, bool]], already: int
) -> None:
    """A task that is tried again reports from 0, and the size of a task is an estimate."""
    progress = Progress("reading", sizes, unit="B", already=already)
    before = already
    for task, n, is_relative in reports:
        (progress.add if is_relative else progress.set)(task % len(sizes), n)
        assert before <= progress.n <= progress.total
        before = progress.n
    for task in range(len(sizes)):
        progress.finish(task)
    assert progress.n == progress.total == already + sum(sizes)


def test_a_stage_counts_the_bytes_of_its_tasks_as_they_read_and_a_resumed_one_those_that_are_done(
    tmp_path: Path,
) -> None:
    seen: list[tuple[str, int, int]] = []

    def reading(prefix: Path, n: int) -> dict[str, int]:
        for _ in range(n // 10):
            advance(10)
            seen.append((str(current[0]), current[0].n, current[0].total))
        return {}

    current: list[Progress] = []

    def run_all(task, arguments, progress):  # type: ignore[no-untyped-def]
        current[:] = [progress]
        return _run_here(task, arguments, progress)

    Tasks(tmp_path, run_all).run(reading, [(20,)], "reading", [20])
    assert seen == [("reading: 50% (10 B of 20 B)", 10, 20), ("reading: 100% (20 B of 20 B)", 20, 20)]
    seen.clear()
    Tasks(tmp_path, run_all).run(reading, [(20,), (10,), (30,)], "reading", [20, 10, 30])
    assert [n for _, n, _ in seen] == [30, 40, 50, 60]
    assert {total for *_, total in seen} == {60}
    advance(5)  # nobody listens


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
def test_every_stage_of_a_build_that_takes_long_tells_what_it_reads(
    compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that is silent shows as 0 until its tasks end."""
    told: dict[str, int] = {}
    add = Progress.add

    def counted(self: Progress, task: int, n: int) -> None:
        told[self.what] = told.get(self.what, 0) + n
        add(self, task, n)

    monkeypatch.setattr(Progress, "add", counted)
    texts = [document(i).encode() for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt{'.gz' if compress is gzip.compress else ''}").write_bytes(compress(text))
    (tmp_path / "heldout").write_text("one two three four five six seven eight nine ten eleven twelve thirteen")
    options = {"dedup": {"method": "near"}, "decontamination": {"files": str(tmp_path / "heldout")}}
    report = build([tmp_path / "*.txt*"], tmp_path / "out", BuildConfig(vocab_size=300, **options))
    n_bytes = sum(map(len, texts))
    assert {told[what] for what in ("comparing", "searching", "sampling", "tokenizing")} == {n_bytes}
    assert told["shuffling"] == report["tokens"]
    assert told["reading"] == sum(len(compress(text)) * (4 if compress is gzip.compress else 1) for text in texts)


class Terminal:
    """A pseudo terminal as standard error, and what is drawn on it."""

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._there, here = pty.openpty()
        fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(here, "w")
        monkeypatch.setattr(sys, "stderr", self.stream)
        self.drawn, self._found, self._wanted = "", threading.Event(), ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._there, 2**16):
                self.drawn += data.decode(errors="replace")
                if self._wanted and self._wanted in self.drawn:
                    self._found.set()
        except OSError:
            pass

    def wait_for(self, text: str) -> None:
        self._wanted = text
        if text not in self.drawn:
            assert self._found.wait(60), self.drawn

    def close(self) -> str:
        self.stream.close()
        self._reader.join(60)
        os.close(self._there)
        return self.drawn


@pytest.fixture
def _drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_progress, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(executor_progress, "DRAWN_EVERY", 0.01)


@pytest.mark.usefixtures("_drawn_at_once")
@pytest.mark.parametrize("columns", [40, 80, 120, 0])
def test_a_bar_fits_its_terminal_moves_within_a_task_and_is_cleared(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(columns, monkeypatch)
    progress = Progress("tokenizing", [4_000_000, 4_000_000], unit="B")
    with progress.shown():
        with listening(partial(progress.add, 0)):
            advance(2_000_000)
        terminal.wait_for("tokenizing:  25%|")
        terminal.wait_for("2.00M/8.00M" if columns != 40 else "25%|")
        note("a line above the bar")
    drawn = terminal.close()
    assert "a line above the bar" in drawn
    frames = re.split(r"[\r\n]+", drawn)
    assert max(map(len, frames)) <= (columns or 80)
    assert re.search(r"\r *\r$", drawn)
    if columns != 40:
        assert "B/s]" in drawn


@pytest.mark.usefixtures("_drawn_at_once")
def test_a_single_task_that_reports_nothing_shows_how_long_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80, monkeypatch)
    with Progress("training a tokenizer", [1]).shown():
        terminal.wait_for("training a tokenizer: 00:00")
    assert "%" not in terminal.close()


def test_a_log_gets_a_line_now_and_then_and_none_of_a_short_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            n = super().write(text)
            if "\n" in text:
                written.set()
            return n

    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress("reading", [100], unit="B").shown():
        pass
    assert log.getvalue() == ""
    monkeypatch.setattr(executor_progress, "LOGGED_EVERY", 0.01)
    progress = Progress("reading", [4_000_000, 4_000_000], unit="B")
    progress.set(0, 2_000_000)
    with progress.shown():
        assert written.wait(60)
    assert re.match(r"reading: 25% \(2 MB of 8 MB\), 0 s, \S+ [kMGT]?B/s, about \d+ s left\n", log.getvalue())
