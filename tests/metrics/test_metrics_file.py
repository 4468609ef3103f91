"""metrics.jsonl: rows of older versions have today's names, and a resumed run goes on with whole rows."""

import json
import math
import time

from megagpt.metrics.metrics_file import append_row, keep_up_to, new_row, read_rows
from megagpt.train.monitor import validation_losses

OLD = [  # 10 steps, then 2 with an evaluation, then a save alone
    {"step": 10, "tokens_seen": 640, "loss/train": 4.0, "grad_norm": 0.5, "lr": 0.1, "tokens_per_sec": 64.0}
    | {"memory_gib": 1.0, "mfu": 0.4, "hfu": 0.5, "skipped_steps": 1, "epoch": 0.25}
    | {"seconds/data": 1.0, "seconds/step": 9.0, "cluster/data_slowest_rank": 1.0},
    {"step": 12, "tokens_seen": 768, "loss/train": None, "seconds/data": 0.5, "seconds/step": 1.5},
    {"step": 12, "tokens_seen": 768, "loss/val": 3.0, "perplexity": 20.0, "bits_per_byte": 2.0, "seconds/eval": 7.0},
    {"step": 12, "tokens_seen": 768, "seconds/save": 8.0, "seconds/write": 9.0},
    {"step": 12, "tokens_seen": 768, "seconds/sample": 6.0},
]
NEW = [
    {"step": 10, "tokens_seen": 640, "train/loss": 4.0, "optim/grad_norm": 0.5, "optim/lr": 0.1}
    | {"perf/tokens_per_sec": 64.0, "perf/memory_gib": 1.0, "perf/mfu": 0.4, "perf/hfu": 0.5}
    | {"optim/skipped_steps": 1, "data/epoch": 0.25, "data/wait_seconds_per_step": 0.1, "perf/seconds_per_step": 0.9}
    | {"cluster/data_slowest_rank": 1.0},
    {"step": 12, "tokens_seen": 768, "train/loss": None}
    | {"data/wait_seconds_per_step": 0.25, "perf/seconds_per_step": 0.75},
    {"step": 12, "tokens_seen": 768, "val/loss": 3.0, "val/perplexity": 20.0, "val/bits_per_byte": 2.0}
    | {"perf/eval_seconds": 7.0},
    {"step": 12, "tokens_seen": 768, "perf/save_seconds": 8.0, "perf/write_seconds": 9.0},
    {"step": 12, "tokens_seen": 768, "perf/sample_seconds": 6.0},
]


def written(file, rows, end=""):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return file


def test_rows_of_older_versions_have_todays_names_and_the_seconds_of_a_step(tmp_path):
    file = written(tmp_path / "metrics.jsonl", OLD)
    assert read_rows(file) == NEW
    assert validation_losses(file) == {12: 3.0}
    assert [json.loads(line) for line in file.read_text().splitlines()] == OLD  # reading changes nothing


def test_a_resumed_run_renames_its_rows_once(tmp_path):
    later = {"step": 13, "tokens_seen": 832, "loss/train": 2.0}
    file = written(tmp_path / "metrics.jsonl", [*OLD, later], '{"step": 12, "loss')
    assert keep_up_to(file, 12) == NEW
    once = file.read_bytes()
    assert keep_up_to(file, 12) == read_rows(file) == NEW
    assert file.read_bytes() == once
    row = new_row(14, 896, {"perf/seconds_per_step": 1.0, "train/loss": math.inf})
    assert abs(time.time() - row["time"]) < 60  # it is rounded
    append_row(file, row)
    assert read_rows(file)[:-1] == NEW
    new = {"step": 14, "tokens_seen": 896, "time": row["time"], "perf/seconds_per_step": 1.0, "train/loss": None}
    assert read_rows(file)[-1] == new


def test_steps_of_an_older_and_of_this_version_may_follow_one_another(tmp_path):
    """As when an older megagpt resumed a run in between."""
    rows = [{"step": 4, "perf/seconds_per_step": 1.0}, {"step": 6, "seconds/step": 3.0}]
    file = written(tmp_path / "metrics.jsonl", rows)
    assert read_rows(file) == [{"step": 4, "perf/seconds_per_step": 1.0}, {"step": 6, "perf/seconds_per_step": 1.5}]


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_rows(file) == keep_up_to(file, 3) == []
    file.write_bytes(b'\x00\x00\n[1]\n{"step": "x"}\n{"loss/val": 1}\n{"step": 2, "loss/val": NaN}\n{"step": 3}')
    [row] = read_rows(file)
    assert row["step"] == 2
    assert row["val/loss"] != row["val/loss"]
