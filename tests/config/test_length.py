"""The length of a run, given in epochs of its data."""

import re
from pathlib import Path

import numpy as np
import pytest
from data_support import write_dataset
from support import DEBUG_RUN, debug_run, overrides

from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.run_file import parse_run
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file


@pytest.mark.parametrize("epochs", [1, 3, 0.1, 2.7])
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
