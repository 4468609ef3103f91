"""Cautious weight decay: against plain loops, and what a skipped update and a saved run make of it."""

import pytest
import torch
from elastic_ranks import whole_state
from support import VOCAB, batch_of, debug_run, take_steps

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.engine.build import build_engine, set_step
from megagpt.engine.cautious import decay_where_it_shrinks
from megagpt.engine.muon import orthogonalize
from megagpt.errors import UserError
from megagpt.lint.linter import lint
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss

LR, MUON_LR, MOMENTUM = 0.003, 0.01, 0.9
DECAY = 10.0  # a step then takes 3 % to 10 % off a weight that decays, far more than rounding
TINY = ["train_batch_size=4", 'megagpt.model={"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16}']
ADAM = [*TINY, f"optimizer.params.lr={LR}"]
MUON = [*ADAM, "optimizer.type=Muon", f"optimizer.params.muon_lr={MUON_LR}", f"optimizer.params.momentum={MOMENTUM}"]
CAUTIOUS = ["optimizer.params.cautious_weight_decay=true", f"optimizer.params.weight_decay={DECAY}"]


def test_by_hand():
    weights = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
    decay_where_it_shrinks(weights, torch.tensor([2.0, -2.0, 0.0, -3.0, 3.0, torch.nan]), 0.25)
    assert weights.tolist() == [0.75, 1.0, 0.75, -0.75, -1.0, 0.0]


@pytest.fixture
def engine_of(dataset, device, tmp_path):
    def build(*overrides):
        run = debug_run(dataset, tmp_path / "run", *overrides)
        engine = build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)
        set_step(engine, run.deepspeed.optimizer.params, lr_factor=1.0)
        return engine

    return build


def weights_of(engine):
    return {name: state[0] for name, state in whole_state(engine).items()}


@torch.no_grad()
def plain_steps(muon):
    """Three steps by the paper, x <- x - lr * (u + decay * [u * x >= 0] * x), with AdamW's update u, or Muon's."""
    torch.manual_seed(1234)  # megagpt.seed
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=16), VOCAB)
    m, v = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    for t in (1, 2, 3):
        model.zero_grad()
        with torch.enable_grad():
            next_token_loss(model(batch_of(t)[:, :-1]), batch_of(t)[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, p in model.named_parameters():
            by_muon = muon and p.ndim == 2 and name.startswith("h.")
            beta = MOMENTUM if by_muon else 0.9
            m[name] = beta * m[name] + (1 - beta) * p.grad
            v[name] = 0.95 * v[name] + 0.05 * p.grad**2
            update = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            if by_muon:
                update = MOMENTUM * m[name] + (1 - MOMENTUM) * p.grad
                orthogonalize(update.chunk(3) if "c_attn" in name else [update])
            decays = DECAY * (p.ndim == 2) * (update * p >= 0)
            p -= (MUON_LR if by_muon else LR) * (update + decays * p)
    return dict(model.named_parameters())


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon"])
def test_steps_are_those_of_the_paper(engine_of, muon, stage):
    engine = engine_of(*(MUON if muon else ADAM), *CAUTIOUS, f"zero_optimization.stage={stage}")
    found, expected = weights_of(take_steps(engine, 1, 2, 3)), plain_steps(muon)
    for name, weight in expected.items():
        wrong = ~torch.isclose(found[name].view_as(weight), weight, atol=1e-4)
        assert wrong.double().mean() < 0.001, name  # of a few weights rounding decides the sign of the update


def test_a_skipped_update_decays_nothing(engine_of):
    engine = engine_of(*ADAM, *CAUTIOUS, "zero_optimization.stage=0")
    take_steps(engine, 1)
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.basic_optimizer.found_inf = torch.ones(())
    take_steps(engine, 2)
    assert all(map(torch.equal, before, engine.module.parameters()))
    engine.basic_optimizer.found_inf.zero_()
    take_steps(engine, 3)
    assert not any(map(torch.equal, before, engine.module.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["optimizer.type=Adam", "optimizer.params.adam_w_mode=false"],
            "does not work with optimizer.params.adam_w_mode=false",
        ),
        (
            ["zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=cpu"],
            r"device='cpu' and DeepSpeed's CPUAdam.*; set optimizer\.params\.torch_adam to true",
        ),
    ],
)
def test_where_the_decay_cannot_be_cautious_it_is_refused(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path, *CAUTIOUS, *options)
    debug_run(dataset, tmp_path, *options)


def test_lint_warns_where_nothing_decays(dataset, tmp_path):
    run = debug_run(dataset, tmp_path, CAUTIOUS[0], "optimizer.params.weight_decay=0")
    warning = "optimizer.params.cautious_weight_decay=true has no effect: optimizer.params.weight_decay is 0"
    assert any(warning in issue.text for issue in lint(run))
