"""The length of a run, given in epochs of its data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_support import write_dataset
from support import DEBUG_RUN, debug_run, overrides

from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.run_file import parse_run
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file


@pytest.mark.parametrize("epochs", [1, 3, 0.3, 2.7])
def test_epochs_are_the_steps_after_which_the_sampler_has_read_them(dataset, tmp_path, epochs):
    """The steps of the run file against the sampler's own count, also of a dataset of two unequal variants."""
    for path in (dataset, two_variants(tmp_path)):
        shape = ["train_batch_size=8", f'megagpt.schedule={{"max_epochs": {epochs}}}', "megagpt.data.seq_len=48"]
        run = debug_run(path, tmp_path / "run", *shape)
        data, steps = open_samples(run.megagpt, 8, None), run.megagpt.schedule.max_steps
        before, after = (data.epochs(8 * n)[0] for n in (steps - 1, steps))
        assert before < epochs - 1e-9
        assert after >= epochs - 1e-12
        assert run.changed("train_batch_size=16").megagpt.schedule.max_steps == -(-steps // 2)
        assert parse_run(run.as_json()).megagpt.schedule.max_steps == steps


def test_a_run_is_linted_and_changed_where_its_data_is_not(dataset, tmp_path):
    """Its run.json has the steps that the data once gave."""
    run = debug_run(dataset, tmp_path / "run", "train_batch_size=8", 'megagpt.schedule={"max_epochs": 1}')
    plain = run.as_json()
    plain["megagpt"]["data"]["train"][0]["path"] = "elsewhere"
    moved = parse_run(plain).changed("gradient_accumulation_steps=null", "zero_optimization.stage=2")
    assert moved.megagpt.schedule.max_steps == run.megagpt.schedule.max_steps
    (tmp_path / "run.json").write_text(json.dumps(plain))
    assert [found for found in lint_file(tmp_path / "run.json") if found.level == "error"] == []
    with pytest.raises(UserError, match="no finished dataset"):
        parse_run(plain).changed("train_batch_size=16")


def test_data_that_differs_between_hosts_is_not_told_as_another_run_file(tmp_path):
    """The same path has another dataset on the other host: the steps differ, and what the run file gives does not."""
    rng, given = np.random.default_rng(0), []
    for n in (40, 60):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_dataset(tmp_path / "data", [np.append(rng.integers(3, 300, 99), 2) for _ in range(n)])
        given.append(debug_run(tmp_path / "data", tmp_path / "run", 'megagpt.schedule={"max_epochs": 3}'))
    here, there = given
    assert here.megagpt.schedule.max_steps < there.megagpt.schedule.max_steps
    assert here.given() == there.given()


RAMP = {"batch_ramp_steps": 4, "first_batch": 4}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"max_tokens": 512, "max_steps": 9}, "max_tokens=512 makes 1 steps of 8 x 64 tokens, and .*=9"),
        (
            {"max_tokens": 5000, "max_steps": 9, **RAMP},
            "max_tokens=5000 makes 12 steps of 4 to 8 x 64 tokens, and .*=9",
        ),
        (
            {"max_epochs": 1, "max_steps": 9, **RAMP},
            r"max_epochs=1 makes \d+ steps of 4 to 8 samples, and an epoch has \d+ samples, and .*=9",
        ),
        (
            {"max_tokens": 255, **RAMP},
            r"is less than the 256 tokens of one step, \S+first_batch=4 x 64; set \S+ to 1024 .*lower \S+first_batch$",
        ),
        ({"max_tokens": 511}, "is less than the 512 tokens of one step, train_batch_size=8 x 64; set .* to 512"),
        ({"max_epochs": 0.001}, r"max_epochs=0.001 is \d samples, less than one step, train_batch_size=8; set .* to"),
        (
            {"max_epochs": 0.001, **RAMP},
            r"is \d samples, less than one step, megagpt.schedule.first_batch=4; set .* to",
        ),
    ],
)
def test_a_length_that_its_steps_do_not_make_is_refused_with_their_sizes(dataset, tmp_path, schedule, message):
    options = ["train_batch_size=8", f"megagpt.schedule={json.dumps(schedule)}"]
    with pytest.raises(UserError, match=message) as refused:
        debug_run(dataset, tmp_path / "run", *options)
    if found := re.search(r"set (\S+) to (\S+) or more", str(refused.value)):
        key, value = found.groups()
        assert debug_run(dataset, tmp_path / "run", *options, f"{key}={value}").megagpt.schedule.max_steps < 9


def test_a_wrong_batch_makes_no_other_mistakes(dataset, tmp_path):
    wrong = [f"megagpt.schedule={json.dumps({'max_tokens': 512, **RAMP})}", "train_batch_size=7.5"]
    found = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *wrong])
    assert [issue.key for issue in found] == ["train_batch_size"]


def two_variants(folder: Path) -> Path:
    """A dataset whose second variant has more tokens than the first."""
    rng = np.random.default_rng(0)
    first, second = ([np.append(rng.integers(3, 300, n), 2) for _ in range(40)] for n in (99, 129))
    write_dataset(folder / "two", first, resampled=[second])
    return folder / "two"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["megagpt.schedule.max_epochs=2"], r"max_epochs=2 makes \d+ steps of 8 samples.*max_steps=20; remove one"),
        (['megagpt.schedule={"max_epochs": 2, "max_tokens": 512}'], r"max_epochs=2 and .*max_tokens=512 both give"),
        (['megagpt.schedule={"max_epochs": 0}'], r"megagpt\.schedule\.max_epochs"),
        (['megagpt.schedule={"max_epochs": "many"}'], r"megagpt\.schedule\.max_epochs"),
        (['megagpt.schedule={"max_epochs": 1e300}'], r"megagpt\.schedule\.max_epochs"),
        (['megagpt.schedule={"max_epochs": 1}', "megagpt.packing.kind=best-fit"], "counted only when they are packed"),
        (['megagpt.schedule={"max_epochs": 1}', "megagpt.data.train.0.path=nowhere"], "no finished dataset; correct"),
        (['megagpt.schedule={"max_epochs": 1}', "megagpt.data.seq_len=40000"], "too few for two samples of 40000; set"),
        (
            ['megagpt.schedule={"max_epochs": 1}', 'megagpt.data.train=[{"path": "a"}, {"path": "b"}]'],
            "with 2 datasets in megagpt.data.train",
        ),
    ],
)
def test_epochs_that_cannot_be_counted_are_refused_by_training_and_by_lint_alike(dataset, tmp_path, options, message):
    shape = ["train_batch_size=8", "megagpt.model.seq_len=40000", "megagpt.data.seq_len=64", *options]
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path / "run", *shape)
    [found] = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *shape])
    assert found.level == "error"
    assert re.search(message, found.text)
