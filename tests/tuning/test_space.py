"""The space of a study: what it draws, and what is wrong with one."""

import json

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial
from support import DEBUG_RUN, debug_run

from megagpt.config.run_file import load_run_config
from megagpt.errors import UserError
from megagpt.tuning.space import overrides_of, read_space

CONFIGS = DEBUG_RUN.parent
LR = {"low": 1e-4, "high": 1e-2, "log": True}
SPACE = {
    "optimizer.type": {"choices": ["AdamW", "Muon"]},
    "optimizer.params.lr": LR,
    "optimizer.params.muon_lr": {"low": 0.002, "high": 0.02, "when": {"optimizer.type": "Muon"}},
    "megagpt.model.n_layer": {"low": 1, "high": 4},
    "megagpt.model.tied": {"choices": [True, False]},
    "megagpt.augment.goldfish": {"choices": [{"k": 0}, {"k": 8}]},
}


@pytest.fixture
def read(dataset, tmp_path):
    run = debug_run(dataset, tmp_path / "run")

    def reader(space):
        (tmp_path / "space.json").write_text(space if isinstance(space, str) else json.dumps(space))
        return read_space(tmp_path / "space.json", lambda options: run.changed(*options))

    reader.run = run
    return reader


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_whatever_is_drawn_lies_within_and_is_a_run_file(read_once, seed):
    space, run = read_once
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    values = space.draw(study.ask())
    assert 1e-4 <= values["optimizer.params.lr"] <= 1e-2
    assert float(f"{values['optimizer.params.lr']:.4g}") == values["optimizer.params.lr"]  # as people type it
    assert isinstance(values["megagpt.model.n_layer"], int)
    assert 1 <= values["megagpt.model.n_layer"] <= 4
    assert ("optimizer.params.muon_lr" in values) == (values["optimizer.type"] == "Muon")
    drawn = run.changed(*overrides_of(values))
    assert drawn.deepspeed.optimizer.params.lr == values["optimizer.params.lr"]
    assert drawn.megagpt.augment.goldfish.k == values["megagpt.augment.goldfish"]["k"]
    assert drawn.megagpt.model.tied is values["megagpt.model.tied"]


@pytest.fixture(scope="module")
def read_once(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    (folder / "space.json").write_text(json.dumps(SPACE))
    run = debug_run(dataset, folder / "run")
    return read_space(folder / "space.json", lambda options: run.changed(*options)), run


def test_a_condition_that_does_not_hold_leaves_the_key_out(read):
    fixed = {"optimizer.type": '"AdamW"', "optimizer.params.lr": 0.001}
    space = read({key: SPACE[key] for key in list(SPACE)[:3]})
    assert space.draw(FixedTrial(fixed)) == {"optimizer.type": "AdamW", "optimizer.params.lr": 0.001}


def test_a_value_that_another_keys_value_makes_possible_is_no_mistake(read):
    sizes = {"megagpt.model.n_embd": {"choices": [64, 96]}, "megagpt.model.n_head": {"choices": [2, 3]}}
    assert list(read(sizes).dimensions) == list(sizes)  # 3 heads divide 96, though not the run file's 64
    with pytest.raises(UserError, match="n_head=5"):
        read({**sizes, "megagpt.model.n_head": {"choices": [2, 5]}})


def test_the_space_of_the_documentation_is_one_of_the_run_files_that_it_names():
    for name in ("char_cpu.json", "debug_cpu.json", "my_text.json"):
        space = read_space(
            CONFIGS / "tune_space.json", lambda options, name=name: load_run_config(CONFIGS / name, options)
        )
        assert "optimizer.params.muon_lr" in space.dimensions


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"no keys to tune; write for example {\"optimizer\.params\.lr\""),
        ("[1]", r"space\.json"),
        ({"optimizer.params.lrr": LR}, r"did you mean .*optimizer\.params\.lr"),
        ({"learning_rate": LR}, r"optimizer\.params\.lr"),
        ({"optimizer.params.lr": 0.1}, r'optimizer\.params\.lr is 0\.1; write {"low": \.\.\., "high": \.\.\.}'),
        ({"optimizer.params.lr": [0.1, 0.2]}, r'write {"choices": \[0\.1, 0\.2\]}'),
        ({"optimizer.params.lr": {}}, r'give "low" and "high", or "choices"'),
        ({"optimizer.params.lr": {"low": "1e-4", "high": 0.1}}, r'"1e-4" is a text; write a number'),
        ({"optimizer.params.lr": {"low": 0.1}}, r'"low" and "high" go together'),
        ({"optimizer.params.lr": {"low": 0.1, "high": 0.01}}, r'"low" must be less'),
        ({"optimizer.params.lr": {"low": 0, "high": 0.01, "log": True}}, "which has no logarithm"),
        ({"optimizer.params.lr": {"low": -1.0, "high": 0.01}}, r"optimizer\.params\.lr"),
        ({"optimizer.params.lr": {"min": 1, "max": 2}}, r"there is no such key"),
        ({"optimizer.params.lr": {"choices": []}}, r"choices"),
        ({"optimizer.params.lr": {"choices": [0.1, 0.1]}}, "has a value twice"),
        ({"megagpt.model.n_layer": {"low": 0.5, "high": 4}}, r"megagpt\.model\.n_layer"),
        ({"megagpt.out_dir": {"choices": ["a", "b"]}}, "each trial has a folder of its own"),
        ({"megagpt.data.val": {"choices": ["a", "b"]}}, "cannot be compared"),
        ({"megagpt.schedule.max_steps": {"low": 10, "high": 20}}, "after equal steps"),
        ({"megagpt.every.eval": {"low": 10, "high": 20}}, "evaluations are what trials are compared at"),
        (
            {"optimizer.params.muon_lr": {"low": 0.1, "high": 0.2, "when": {"optimizer.typ": "Muon"}}},
            r'"when" names optimizer\.typ, which no key before it is',
        ),
        (
            {
                "optimizer.type": {"choices": ["AdamW", "Muon"]},
                "optimizer.params.muon_lr": {"low": 0.1, "high": 0.2, "when": {"optimizer.type": "muon"}},
            },
            r'wants optimizer\.type="muon", which has the choices "AdamW", "Muon"',
        ),
    ],
)
def test_what_is_wrong_with_a_space_is_told_before_anything_trains(read, space, message):
    with pytest.raises(UserError, match=message):
        read(space)
