"""Learning rates of embeddings, head and vectors: the first step by hand, and groups over checkpoints and layouts."""

import pytest
import torch
from elastic_ranks import opened, options, whole_state
from support import debug_run, metric

from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.load import load_model
from megagpt.config.batch import batch_plan
from megagpt.engine.build import build_engine, learning_rates, set_step
from megagpt.engine.safe_pickle import load_checked
from megagpt.engine.state_files import consolidated_weights
from megagpt.errors import UserError
from megagpt.model.loss import next_token_score
from megagpt.train.trainer import train

VOCAB, LR = 128, 0.001
FACTORS = {"embeddings": 4.0, "head": 0.5, "vectors": 2.0}
SCALE = 'optimizer.params.lr_scale={"embeddings": 4, "head": 0.5, "vectors": 2}'
ONES = "optimizer.params.lr_scale={}"
UNTIED = 'megagpt.model={"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 64, "tied": false}'
MUON = ["optimizer.type=Muon", "optimizer.params.muon_lr=0.01"]


def factor_of(name):
    if name.startswith(("wte", "wpe")):
        return 4.0
    return 0.5 if name.startswith("lm_head") else 1.0 if name.endswith("weight") and "ln_" not in name else 2.0


@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_first_step_of_adam_has_the_size_of_each_rate(dataset, device, tmp_path, stage, muon):
    """It is the rate times the sign of the gradient, where that is far above eps."""
    optimizer = [f"optimizer.params.lr={LR}", "optimizer.params.weight_decay=0", *(MUON if muon else [])]
    run = debug_run(dataset, tmp_path, SCALE, UNTIED, *optimizer, f"zero_optimization.stage={stage}")
    engine = build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)
    for lr in (0.0, LR):  # the first step leaves the weights, and moments whose ratio the same gradient leaves too
        set_step(engine, run.deepspeed.optimizer.params, lr_factor=lr / LR)
        before = whole_state(engine) if lr else {}
        batch = torch.randint(0, VOCAB, (4, 65), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            engine.backward(engine(batch[:, :-1], score=next_token_score(batch[:, 1:])))
            engine.step()
    assert learning_rates(engine)["lr"] == LR
    for name, (weights, *moments) in whole_state(engine).items():
        if len(moments) == 2:
            step = (weights - before[name][0]).abs().max().item()
            assert step == pytest.approx(LR * factor_of(name), rel=0.01), name


@pytest.mark.parametrize("optimizer", [[], MUON], ids=["AdamW", "Muon"])
def test_factors_of_1_change_no_loss(dataset, device, tmp_path, optimizer):
    for name, more in {"with": [ONES], "without": []}.items():
        train(debug_run(dataset, tmp_path / name, UNTIED, "megagpt.every.eval=0", *optimizer, *more), device)
    assert metric(tmp_path / "with", "train/loss") == pytest.approx(
        metric(tmp_path / "without", "train/loss"), abs=1e-4
    )


LAYOUTS = [
    ["zero_optimization.stage=0"],
    ["zero_optimization.stage=2"],
    ["zero_optimization.stage=3", "zero_optimization.sub_group_size=3000"],
    ["zero_optimization.stage=0", "bf16.enabled=true"],
]


@pytest.mark.parametrize("optimizer", [[], MUON], ids=["AdamW", "Muon"])
def test_another_layout_takes_over_every_bit(dataset, device, tmp_path, optimizer):
    more = options(1, SCALE, UNTIED, *optimizer, "megagpt.ema.decay=0.5")
    train(debug_run(dataset, tmp_path / "run", *more), device, stop_at=2)
    expected = whole_state(opened(dataset, tmp_path / "run", *more))
    for other in LAYOUTS:
        found = whole_state(opened(dataset, tmp_path / "run", *more, *other))
        for name, state in found.items():
            assert all(torch.equal(a, b) for a, b in zip(state, expected[name], strict=True)), (other, name)
    raw, average = (load_model(tmp_path / "run", device, ema=ema).model.state_dict() for ema in (False, True))
    for name, weight in raw.items():
        assert torch.equal(weight.view(-1), expected[name][0]), name
        assert 0 < (weight - average[name]).abs().max() < 0.02, name  # two small steps apart: its own average


@pytest.mark.parametrize("optimizer", [[], MUON], ids=["AdamW", "Muon"])
def test_the_weights_of_a_step_at_stage_0_in_bf16_are_found_again(dataset, device, tmp_path, optimizer):
    few = ["megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0", "bf16.enabled=true"]
    train(debug_run(dataset, tmp_path, SCALE, UNTIED, *few, *optimizer, "zero_optimization.stage=0"), device)
    [step_dir] = committed(tmp_path)
    computed_with = load_checked(step_dir / "mp_rank_00_model_states.pt")["module"]
    for name, weight in consolidated_weights(step_dir).items():
        assert torch.equal(weight.bfloat16(), computed_with[name]), name


def test_factors_may_change_on_resume_but_not_come_or_go(dataset, device, tmp_path):
    more = options(2, UNTIED)
    for name, first, refused in (("with", [SCALE], []), ("without", [], [SCALE])):
        train(debug_run(dataset, tmp_path / name, *more, *first), device, stop_at=2)
        with pytest.raises(UserError, match=r"was saved with lr_scale .*, and this run has .*; start it as it was"):
            train(debug_run(dataset, tmp_path / name, *more, *refused), device)
    engine = opened(dataset, tmp_path / "with", *more, 'optimizer.params.lr_scale={"embeddings": 8}')
    assert [group["lr_scale"] for group in engine.optimizer.param_groups] == [8.0, 1.0, 1.0, 1.0]
