"""A finished run that is extended: the jump of its learning rate is printed, and a key keeps the old curve's end."""

import json

import pytest
from pydantic import ValidationError
from support import MUON, debug_run, metric

from megagpt.config.schedule import ScheduleConfig
from megagpt.errors import UserError
from megagpt.train.lr_schedule import jumps_of_rates, lr_factor
from megagpt.train.trainer import train

SHAPES = [
    *({"shape": "cosine"}, {"shape": "linear"}, {"shape": "warmup-stable-decay", "decay_steps": 4}),
    {"shape": "warmup-stable-decay", "decay_from": 6},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_up_to_its_end_the_curve_is_that_of_a_run_of_so_many_steps_and_its_last_rate_stays(shape):
    short = ScheduleConfig(max_steps=10, warmup_steps=2, **shape)
    long = ScheduleConfig(max_steps=30, end_step=10, warmup_steps=2, **shape)
    rates = [lr_factor(step, long) for step in range(30)]
    assert rates[:10] == [lr_factor(step, short) for step in range(10)]
    assert set(rates[9:]) == {rates[9]}
    assert rates[9] == pytest.approx(0.1)


def test_warmup_and_decay_end_before_the_curve_does():
    with pytest.raises(ValidationError, match=r"exceed megagpt\.schedule\.end_step=5"):
        ScheduleConfig(max_steps=30, end_step=5, warmup_steps=6)


def saved(lr=3e-3, **schedule):
    return {"optimizer": {"params": {"lr": lr}}, "megagpt": {"schedule": schedule}}


def test_the_jump_of_an_extended_run_is_named_with_the_key_that_avoids_it():
    """Half a cosine over 20 steps: at its middle the rate is 0.55 of the peak, where the end of 10 steps is 0.1."""
    longer = ScheduleConfig(max_steps=21)
    (text,) = jumps_of_rates(saved(max_steps=10), 10, {"lr": 3e-3}, longer)
    assert text.startswith(
        "learning rate: 3.00e-04 in step 10, 1.65e-03 in step 11; megagpt.schedule.end_step=10 keeps"
    )
    kept = longer.model_copy(update={"end_step": 10})
    assert jumps_of_rates(saved(max_steps=10), 10, {"lr": 3e-3}, kept) == []


def test_a_run_that_continues_as_planned_or_nearly_so_has_no_jump():
    schedule = {"max_steps": 20, "warmup_steps": 8}
    for step in (1, 8, 12, 20):
        assert jumps_of_rates(saved(**schedule), step, {"lr": 3e-3}, ScheduleConfig(**schedule)) == []
    assert jumps_of_rates(saved(**schedule), 10, {"lr": 3e-3}, ScheduleConfig(max_steps=22, warmup_steps=8)) == []
    (told,) = jumps_of_rates(saved(**schedule), 10, {"lr": 3e-2}, ScheduleConfig(**schedule))
    assert told.startswith("learning rate: ")
    assert "end_step" not in told


def test_extending_a_run_prints_the_jump_and_the_named_key_avoids_it(dataset, device, tmp_path, capsys):
    def run(*options):
        every = 'megagpt.every={"log": 1, "eval": 0, "save": 0}'
        kept = [every, "megagpt.data.val_tokens=128", "megagpt.schedule.warmup_steps=0"]
        train(debug_run(dataset, tmp_path / "run", *kept, *options), device)
        return capsys.readouterr().out

    run("megagpt.schedule.max_steps=5")
    run("megagpt.schedule.max_steps=6", "megagpt.schedule.end_step=5")
    assert metric(tmp_path / "run", "optim/lr")[6] == metric(tmp_path / "run", "optim/lr")[5]
    assert "  learning rate: 3.00e-04 in step 6, " in run("megagpt.schedule.max_steps=20")


def test_the_rate_of_muon_jumps_too():
    params = {"optimizer": {"params": {"lr": 3e-3, "muon_lr": 0.02}}, "megagpt": {"schedule": {"max_steps": 20}}}
    (told,) = jumps_of_rates(params, 10, {"lr": 3e-3, "muon_lr": 0.2}, ScheduleConfig(max_steps=20))
    assert told.startswith("learning rate of Muon: ")
    assert jumps_of_rates(params, 10, {"lr": 3e-3, "muon_lr": 0.02}, ScheduleConfig(max_steps=20)) == []
    both = jumps_of_rates(params, 20, {"lr": 3e-3, "muon_lr": 0.02}, ScheduleConfig(max_steps=41))
    assert [line[:34] for line in both] == ["learning rate: 3.00e-04 in step 20", "learning rate of Muon: 2.00e-03 in"]


def test_a_constant_run_is_resumed_to_decay_from_its_step_and_not_from_an_earlier_one(dataset, device, tmp_path):
    def run(*options):
        every = 'megagpt.every={"log": 1, "eval": 0, "save": 0}'
        kept = [every, "megagpt.data.val_tokens=128", "megagpt.schedule.warmup_steps=0"]
        return train(debug_run(dataset, tmp_path / "run", *kept, *options), device)

    decays = ["megagpt.schedule.shape=warmup-stable-decay", "megagpt.schedule.max_steps=10"]
    run("megagpt.schedule.shape=constant", "megagpt.schedule.max_steps=6")
    with pytest.raises(UserError, match=r"decay_from=4 is in the past: the run is at step 6.*decay_from to 6 or more"):
        run(*decays, "megagpt.schedule.decay_from=4")
    run(*decays, "megagpt.schedule.decay_from=6")
    assert list(metric(tmp_path / "run", "optim/lr").values()) == pytest.approx(
        [3e-3] * 6 + [3e-3 * (1 - 0.9 * k / 4) for k in (1, 2, 3, 4)]
    )
    assert run(*decays, "megagpt.schedule.decay_from=6", "megagpt.schedule.max_steps=10").step == 10


def test_a_budget_in_tokens_is_kept_when_a_resumed_run_has_another_batch(dataset, device, tmp_path):
    """Four steps of 8 x 64 tokens are 2,048; one more step of twice that makes 3,072."""

    def run(schedule, batch):
        every = 'megagpt.every={"log": 1, "eval": 0, "save": 0}'
        options = [every, "megagpt.data.val_tokens=128", f"megagpt.schedule={schedule}", f"train_batch_size={batch}"]
        return train(debug_run(dataset, tmp_path / "run", *options), device)

    assert run('{"max_tokens": 2048}', 8).step == 4
    with pytest.raises(UserError, match=r"the 4 steps so far had 2048 tokens.*null megagpt\.schedule\.max_steps=5$"):
        run('{"max_tokens": 3072}', 16)
    assert run('{"max_tokens": null, "max_steps": 5}', 16).tokens_seen == 3072


def test_epochs_are_kept_when_a_resumed_run_has_another_batch_or_other_data(dataset, device, tmp_path):
    def run(*options, stop_at=None):
        every = ['megagpt.every={"log": 1, "eval": 0, "save": 0}', "megagpt.data.val_tokens=128"]
        return train(debug_run(dataset, tmp_path / "run", *every, *options), device, stop_at=stop_at)

    epochs = 'megagpt.schedule={"max_epochs": 0.05}'
    assert run(epochs, "train_batch_size=8", stop_at=4).step == 4
    with pytest.raises(
        UserError, match=r"max_epochs=0.05 makes 4 steps.*max_epochs=null megagpt\.schedule\.max_steps=6"
    ):
        run(epochs, "train_batch_size=16")
    state = run('megagpt.schedule={"max_steps": 6}', "train_batch_size=16")
    assert (state.step, state.samples_seen) == (6, 4 * 8 + 2 * 16)
    with pytest.raises(UserError, match=r"max_epochs=0.08 makes 6 steps.*null megagpt\.schedule\.max_steps=8$"):
        run('megagpt.schedule={"max_epochs": 0.08}', "train_batch_size=16")


def test_all_that_follows_the_steps_is_the_same_in_a_run_that_was_stopped_twice(dataset, device, tmp_path):
    schedule = {"max_tokens": 3072, "warmup_steps": 2, "shape": "warmup-stable-decay", "decay_steps": 3}
    schedule |= {"weight_decay_shape": "lr", "momentum_warmup_steps": 5}
    options = [*MUON, "megagpt.data.val_tokens=128", f"megagpt.schedule={json.dumps(schedule)}"]
    for name, stops in {"straight": [None], "stopped": [1, 4, None]}.items():
        for stop_at in stops:
            train(debug_run(dataset, tmp_path / name, *options), device, stop_at=stop_at)
    for curve in ("train/loss", "optim/grad_norm", "optim/lr", "optim/muon_lr"):
        straight = metric(tmp_path / "straight", curve)
        assert len(straight) == 6
        assert straight == metric(tmp_path / "stopped", curve)
