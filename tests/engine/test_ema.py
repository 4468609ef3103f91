"""Averaged weights: against a plain loop, in the engine, over checkpoints and layouts, and in commands."""

import json
import math

import pytest
import torch
from elastic_ranks import options
from support import LR_SCALE, MUON, VOCAB, debug_run, metric, take_steps

from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.config.batch import batch_plan
from megagpt.data.loader import open_data
from megagpt.engine.build import before_update, build_engine, optimizer_groups
from megagpt.engine.ema import averaged, has_averages
from megagpt.errors import UserError
from megagpt.train.evaluate import evaluate
from megagpt.train.trainer import train

DECAY = 0.5
TINY = ["train_batch_size=4", 'megagpt.model={"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16}']
EMA = f"megagpt.ema.decay={DECAY}"
LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]


def weights_of(engine):
    """The fp32 weights that the optimizer updates, flat, in its order."""
    if engine.zero_optimization_stage() == 3:
        return [p.detach().clone() for p in engine.optimizer.fp32_partitioned_groups_flat]
    groups = engine.basic_optimizer.param_groups
    return [p.detach().clone().view(-1) for group in groups for p in group["params"]]


def averages_of(engine):
    state = engine.basic_optimizer.state
    if engine.zero_optimization_stage() == 3:
        return [state[p]["ema"].clone() for p in engine.optimizer.fp32_partitioned_groups_flat]
    groups = engine.basic_optimizer.param_groups
    return [state[p]["ema"].clone().view(-1) for group in groups for p in group["params"]]


def logits_of(engine):
    tokens = torch.arange(16).unsqueeze(0)
    engine.eval()
    with torch.no_grad():
        found = engine(tokens).float()
    engine.train()
    return found


@pytest.fixture
def engine_of(dataset, device, tmp_path):
    def build(*overrides):
        run = debug_run(dataset, tmp_path / "run", *TINY, *overrides)
        return run, build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)

    return build


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
def test_the_average_is_that_of_a_plain_loop_and_the_engine_computes_with_it_and_without(stage, dtype, engine_of):
    options = [f"zero_optimization.stage={stage}", *(["bf16.enabled=true"] if dtype == "bf16" else [])]
    run, engine = engine_of(EMA, *options)
    assert not has_averages(engine)
    expected = None
    for n in range(1, 9):
        take_steps(engine, n)
        weights = weights_of(engine)
        decay = min(DECAY, (1 + n) / (10 + n))
        expected = expected or weights
        expected = [decay * average + (1 - decay) * w for average, w in zip(expected, weights, strict=True)]
    for found, wanted in zip(averages_of(engine), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    before, logits, averages = weights_of(engine), logits_of(engine), averages_of(engine)
    with averaged(engine, optimizer_groups(engine.module, run)):
        assert not torch.equal(logits_of(engine), logits)
        assert all(map(torch.equal, weights_of(engine), averages))
    assert torch.equal(logits_of(engine), logits)
    assert all(map(torch.equal, weights_of(engine), before))
    assert all(map(torch.equal, averages_of(engine), averages))


def test_an_update_that_a_guard_leaves_out_does_not_move_the_average(engine_of):
    _, engine = engine_of(EMA)
    take_steps(engine, 1)
    before = averages_of(engine)
    before_update(engine, lambda optimizer, norm: setattr(optimizer, "found_inf", torch.ones(())))
    take_steps(engine, 2)
    assert all(map(torch.equal, averages_of(engine), before))


@pytest.mark.parametrize("optimizer", [[LR_SCALE], MUON], ids=["AdamW with lr_scale", "Muon"])
def test_a_run_with_averages_is_resumed_to_the_last_bit_and_on_another_stage(optimizer, dataset, device, tmp_path):
    more = [*optimizer, EMA, 'megagpt.every={"log": 1, "eval": 4, "save": 0}', "megagpt.schedule.max_steps=8"]
    straight = debug_run(dataset, tmp_path / "straight", "zero_optimization.stage=2", *more)
    train(straight, device)
    for name, stages in {"cut": (2, 2), "other stage": (3, 0)}.items():
        for stage, stop_at in zip(stages, (5, None), strict=True):
            run = debug_run(dataset, tmp_path / name, f"zero_optimization.stage={stage}", *more)
            train(run, device, stop_at=stop_at)
    losses = metric(tmp_path / "straight", "val/ema_loss")
    assert list(losses) == [4, 8]
    assert losses[8] != metric(tmp_path / "straight", "val/loss")[8]
    assert metric(tmp_path / "cut", "val/ema_loss") == losses
    assert metric(tmp_path / "other stage", "val/ema_loss") == pytest.approx(losses, abs=1e-4)

    for name in ("straight", "other stage"):  # stages 2 and 0: the averages of the files are those that were measured
        loaded = load_model(tmp_path / name / "checkpoints" / "latest", device, ema=True)
        windows = open_data(straight.megagpt.data, 64, masked=False)[0][""].windows
        token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes())
        assert evaluate(loaded.model, windows, token_bytes, micro_batch=4).loss == pytest.approx(losses[8], abs=1e-4)


def test_averages_begin_late_and_end_early_with_a_word(dataset, device, tmp_path, capfd):
    more = options(1, 'megagpt.every={"log": 1, "eval": 4, "save": 0}')
    out_dir = tmp_path / "run"
    train(debug_run(dataset, out_dir, *more), device, stop_at=4)
    with pytest.raises(UserError, match=r"has no averaged weights: its run was without megagpt\.ema\.decay; leave out"):
        load_model(out_dir, device, ema=True)
    assert main(["generate", str(out_dir), "--ema"]) == 2
    capfd.readouterr()
    train(debug_run(dataset, out_dir, *more, EMA), device, stop_at=8)
    assert "has no averaged weights: the average begins with its weights" in capfd.readouterr().out
    assert list(metric(out_dir, "val/ema_loss")) == [8]
    train(debug_run(dataset, out_dir, *more), device, stop_at=12)
    assert list(metric(out_dir, "val/ema_loss")) == [8]
    with pytest.raises(UserError, match="has no averaged weights"):
        load_model(out_dir / "checkpoints" / "latest", device, ema=True)


def test_the_loss_of_the_average_decides_which_step_is_best(dataset, device, tmp_path):
    decides = [EMA, "megagpt.early_stopping.monitor=val/ema_loss", 'megagpt.every={"log": 1, "eval": 2, "save": 0}']
    run = debug_run(dataset, tmp_path / "run", *decides, "megagpt.schedule.max_steps=6")
    state = train(run, device)
    losses = metric(tmp_path / "run", "val/ema_loss")
    assert state.stopper.best == min(losses.values())
    assert state.val_loss == losses[6]
    with pytest.raises(UserError, match="val/loss was measured on"):
        train(debug_run(dataset, tmp_path / "run", EMA, "megagpt.schedule.max_steps=8"), device)
    with pytest.raises(UserError, match=r"'val/ema_loss' is not measured without averaged weights; set megagpt\.ema\."):
        debug_run(dataset, tmp_path / "other", *decides[1:])


def test_the_command_evaluates_the_averages(dataset, device, tmp_path, capfd):
    run = debug_run(dataset, tmp_path / "run", EMA, "megagpt.data.val_tokens=null", "megagpt.schedule.max_steps=4")
    train(run, device)
    capfd.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--ema", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert math.isclose(found["loss"], metric(tmp_path / "run", "val/ema_loss")[4], abs_tol=1e-5)
