"""Rates over three widths: the arithmetic, the short runs against real training, and what is refused."""

import json
import math

import pytest
from support import DEBUG_RUN, debug_run, metric

from megagpt.__main__ import main
from megagpt.config.model import ModelConfig
from megagpt.distributed.process_group import init_process_group
from megagpt.errors import UserError
from megagpt.train.trainer import train
from megagpt.tuning.transfer_report import Measured, as_json, tables, told
from megagpt.tuning.width_runs import coordinates, loss_of
from megagpt.tuning.widths import exponent, lowest, search, three_widths

SCHEDULE = 'megagpt.schedule={"max_steps": 4, "shape": "linear", "warmup_steps": 1, "min_lr_ratio": 0.0}'


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        ({"n_head": 4, "n_embd": 128}, [(32, 1), (64, 2), (128, 4)]),
        ({"n_head": 12, "n_embd": 768}, [(192, 3), (384, 6), (768, 12)]),
        ({"n_head": 3, "n_embd": 75}, [(25, 1), (50, 2), (75, 3)]),
        ({"n_head": 20, "n_embd": 100}, [(25, 5), (50, 10), (100, 20)]),
    ],
)
def test_widths_are_whole_heads_of_one_size(model, widths):
    keys = [f"megagpt.model.n_embd={width} megagpt.model.n_head={heads}" for width, heads in widths]
    assert [" ".join(options) for options in three_widths(ModelConfig(**model))] == keys


def test_heads_of_keys_and_the_mlp_shrink_with_the_width():
    model = ModelConfig(n_head=8, n_embd=64, n_kv_head=4, mlp_width=200)
    found = [[int(option.split("=")[1]) for option in options] for options in three_widths(model)]
    assert found == [[16, 2, 1, 50], [32, 4, 2, 100], [64, 8, 4, 200]]


@pytest.mark.parametrize("n_head", [1, 2])
def test_a_model_with_too_few_heads_is_refused_with_how_many_it_needs(n_head):
    with pytest.raises(UserError, match=f"n_head={n_head} leaves no two narrower ones; set megagpt.model.n_head to 4"):
        three_widths(ModelConfig(n_head=n_head, n_embd=64))


@pytest.mark.parametrize(("start", "also"), [(0, ()), (-8, ()), (8, (-3,)), (3, ())])
def test_the_search_ends_at_the_best_rate_with_a_worse_one_on_each_side(start, also):
    losses = search(lambda i: (i - 3) ** 2 / 10 if i < 6 else math.inf, start, also)
    assert min(losses, key=losses.get) == 3
    assert {2, 3, 4} <= losses.keys()
    assert lowest({2: 0.5, 3: 0.3, 4: 0.4}) == pytest.approx(3 + 1 / 6)
    assert lowest({3: 0.3, 4: math.inf, 2: 0.4}) == 3
    assert max(search(lambda i: -i, 0)) == 8  # downhill without end


def test_a_power_law_has_its_exponent():
    assert exponent([32, 64, 128], [7 * width**-0.7 for width in (32, 64, 128)]) == pytest.approx(-0.7)
    assert math.isnan(exponent([32, 64, 128], [0.0, 1.0, 2.0]))


def measured(narrow, wide):
    one = Measured("AdamW", "optimizer.params.lr", 0.001)
    for width, losses in ((32, narrow), (64, narrow), (128, wide)):
        one.add(width, {"block 1": (1.0, 0.5), "logits": (width / 10, width / 20)}, losses)
    return one


def test_what_is_told_is_what_was_measured(tmp_path):
    narrow, wide = {1: 2.0, 2: 1.0, 3: 2.0}, {0: 1.25, 1: 0.75, 2: 1.25}
    moved = measured(narrow, wide)
    text = told([moved], 100)
    assert "the change of the logits grows as width^1.00" in text
    assert "is 0.004 at 32 and 0.002 at 128, a factor of 0.50" in text
    assert "ends 0.5000 nats above its best: here 128 was best at 0.50 times the rate of 32;" in text
    assert "Measured with one seed, 100 steps of this run file's data and widths of 32, 64, 128" in text
    assert "tuned at 32, it served 128 as it is" in told([measured(narrow, narrow)], 100)
    assert "nothing can be said about moving it" in told([measured(narrow, {0: 1.0, 1: math.inf, 2: 2.0})], 100)
    assert max(map(len, tables([moved], 100, 10))) <= 100
    near = measured({1: 1.5, 2: 1.0, 3: 1.01}, {2: 1.01, 3: 1.0, 4: 1.5})
    assert "closer than the rates tried, a factor of 2, can tell apart" in told([near], 100)
    facts = as_json([moved, measured(narrow, {0: math.inf, **wide})], tmp_path, steps=100, checked=10, text=text)
    assert json.loads(json.dumps(facts, allow_nan=False))["optimizers"]["AdamW"]["best_rate"]["128"] == 0.002


def test_a_short_run_ends_at_the_loss_of_real_training_and_a_rate_of_almost_nothing_changes_nothing(dataset, tmp_path):
    device = init_process_group()
    every = 'megagpt.every={"log": 1, "eval": 4, "save": 0}'
    run = debug_run(dataset, tmp_path / "trained", SCHEDULE, every, "tensorboard.enabled=false")
    train(run, device)
    assert (
        loss_of(run.changed(f"megagpt.out_dir={tmp_path / 'short'}"), device)
        == metric(tmp_path / "trained", "val/loss")[4]
    )
    # With value residual the first block returns two tensors.
    unmoved = [
        f"megagpt.out_dir={tmp_path / 'still'}",
        "optimizer.params.lr=1e-30",
        "megagpt.model.value_residual=true",
    ]
    still = coordinates(run.changed(*unmoved), device)
    assert list(still) == ["block 1", "block 2", "logits"]
    assert all(size > 0 and change == 0 for size, change in still.values())
    broken = run.changed(f"megagpt.out_dir={tmp_path / 'broken'}", "optimizer.params.lr=1e30")
    assert loss_of(broken, device) == math.inf


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--find-lr"], "--find-lr and --transfer are two commands"),
        (["--space", "space.json"], "--space is of a study, and --transfer makes short runs"),
        (["--hostfile", "hosts"], "--hostfile is of a study, and --transfer makes short runs"),
        (["--trials", "30"], "--trials is of a study, and --transfer makes short runs"),
        (["--seed", "0"], "--seed is of a study, and --transfer makes short runs"),
        ([], "megagpt.model.n_head=2 leaves no two narrower ones"),
        (["megagpt.model.n_head=1"], "megagpt.model.n_head=1 leaves no two narrower ones"),
        (["megagpt.model.n_head=12", "megagpt.model.n_embd=100"], "n_embd=100 is not a multiple of"),
        (["megagpt.init_from=runs/x"], "add megagpt.init_from=null"),
        (
            ["megagpt.model.n_head=4", "megagpt.model.n_embd=100", "megagpt.model.position=sinusoidal"],
            "megagpt.model.position=sinusoidal pairs numbers, and a width of 25 is odd",
        ),
        (["megagpt.model.n_head=4", "megagpt.data.val=gone"], "there is no dataset folder gone"),
    ],
)
def test_what_cannot_be_compared_over_widths_is_one_message(dataset, tmp_path, monkeypatch, capfd, options, told):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", str(DEBUG_RUN), f"megagpt.data.train.0.path={dataset}", *options, "--transfer"]) == 2
    [message] = capfd.readouterr().err.splitlines()
    assert told in message
    assert not list(tmp_path.iterdir())


def test_a_place_for_the_results_that_is_none_is_told_before_anything_trains(dataset, tmp_path, capfd):
    (tmp_path / "file").touch()
    data = [f"megagpt.data.{key}={dataset}" for key in ("train.0.path", "val")]
    words = ["--transfer", "--study", str(tmp_path / "file"), *data, "megagpt.model.n_head=4"]
    assert main(["tune", str(DEBUG_RUN), *words]) == 2
    [message] = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'file'}" in message


def test_a_key_after_the_option_is_not_taken_for_its_steps(capfd):
    for option in ("--transfer", "--find-lr"):
        with pytest.raises(SystemExit, match="2"):
            main(["tune", str(DEBUG_RUN), option, "megagpt.model.n_head=4"])
        assert "megagpt.model.n_head=4 is a key; write it before this option" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("changed", [["zero_optimization.stage=3", "megagpt.model.preset=llama"], []])
def test_rates_are_measured_over_three_widths_with_adam_and_muon(dataset, tmp_path, capfd, changed):
    data = [f"megagpt.data.{key}={dataset}" for key in ("train.0.path", "val")]
    words = ["tune", str(DEBUG_RUN), "--transfer", "20", "--study", str(tmp_path), *data, "megagpt.model.n_head=4"]
    assert main([*words, *changed]) == 0
    out = capfd.readouterr().out
    facts = json.loads((tmp_path / "transfer.json").read_text())
    assert facts["told"] in out
    assert out.startswith("3 widths with AdamW and Muon: at least 18 runs of 20 steps\n")
    assert facts["widths"] == [16, 32, 64]
    assert list(facts["optimizers"]) == ["AdamW", "Muon"]
    for one in facts["optimizers"].values():
        assert all(len(losses) >= 3 for losses in one["val_loss"].values())
        assert one["mean_size_and_change"]["64"]["logits"][1] > 0
