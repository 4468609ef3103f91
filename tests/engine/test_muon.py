"""Muon on one rank: against a plain loop, and what clipping, the guards and another layout do to it.

train/test_two_ranks.py compares ranks and stages.
"""

import copy
import math
from itertools import chain

import pytest
import torch
from elastic_ranks import opened, options, whole_state
from support import VOCAB, batch_of, debug_run, take_steps
from torch.nn.functional import cosine_similarity

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.engine.build import before_update, build_engine, learning_rates, set_step
from megagpt.engine.flat_tensors import ParamSlice
from megagpt.engine.muon import fused_rows, matrices_of, newton_schulz, orthogonalize
from megagpt.engine.optimizer import decay_groups
from megagpt.engine.without_compiler import step_without_compiler
from megagpt.model.flops import hidden_matrices
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss
from megagpt.train.trainer import train

LR, MUON_LR, DECAY, MOMENTUM = 0.003, 0.01, 0.1, 0.9
MUON = [
    *("optimizer.type=Muon", f"optimizer.params.muon_lr={MUON_LR}", f"optimizer.params.momentum={MOMENTUM}"),
    *("train_batch_size=4", 'megagpt.model={"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16}'),
]


@pytest.fixture
def engine_of(dataset, device, tmp_path):
    def build(*overrides):
        run = debug_run(dataset, tmp_path / "run", *MUON, *overrides)
        return build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)

    return build


def weights_of(engine):
    return {name: state[0] for name, state in whole_state(engine).items()}


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (100, 130)])
def test_newton_schulz_keeps_singular_vectors_and_makes_all_singular_values_about_1(shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    u, before, vh = torch.linalg.svd(x, full_matrices=False)
    between = u.mT @ newton_schulz(x) @ vh.mT  # diagonal, if the singular vectors are the same
    values = between.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(between, torch.diag_embed(values), atol=1e-4)
    small = before < 0.01 * x.norm(dim=(-2, -1)).unsqueeze(-1)  # five rounds do not bring these up to 1
    assert 0.65 < values[~small].min() < values.max() < 1.2
    assert small.double().mean() < 0.1


@pytest.mark.parametrize(("spectrum", "atol"), [(1.0, 1e-4), (30.0, 1e-3)], ids=["random", "steep"])
def test_rounds_on_the_gram_matrix_alone_are_those_on_the_matrices(spectrum, atol):
    """Wide matrices (16, 64) in fp32 take them, here from random ones to some of rank 1 but for rounding."""
    u, values, vh = torch.linalg.svd(torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0)), False)
    x = u @ torch.diag_embed(values ** torch.linspace(1.0, spectrum, 16) / values.max() ** 20) @ vh
    assert torch.allclose(newton_schulz(x).double(), newton_schulz(x.double()), atol=atol)


def test_alike_matrices_one_by_one_and_together_and_lying_are_orthogonalized_alike(monkeypatch):
    ours = [torch.randn(shape) for shape in [(8, 24), (24, 8), (8, 24), (8, 8)]]
    alone = [matrix.clone() for matrix in ours]
    for matrix in alone:
        orthogonalize([matrix])
    orthogonalize([ours[0], ours[1].T, ours[2], ours[3]])
    for matrix, same in zip(ours, alone, strict=True):
        assert torch.allclose(matrix, same, atol=1e-5)


def test_the_direction_is_that_of_torchs_muon_and_the_size_of_liu_et_al():
    w, gradient = torch.zeros(48, 32), torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.Parameter(w.clone())
    theirs.grad = gradient.clone()
    muon = torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    step_without_compiler(muon)  # importing it takes seconds
    muon.step()
    orthogonalize([update := gradient.clone()])
    assert cosine_similarity(-theirs.data.flatten(), update.flatten(), dim=0) > 0.999  # torch's computes in bf16
    assert theirs.data.norm().item() == pytest.approx(update.norm().item(), rel=0.01)
    assert root_mean_square(update) == pytest.approx(0.2, rel=0.2)


def root_mean_square(x):
    return x.square().mean().sqrt().item()


def plain_muon(model, steps):
    """The same in a plain loop: Muon by its paper, with q, k and v apart, and torch's AdamW for what is not a matrix
    inside a block."""
    hidden = {name: p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in hidden]
    decays = [{"params": [p for p in others if (p.ndim == 2) == two], "weight_decay": DECAY * two} for two in (0, 1)]
    adam = torch.optim.AdamW(decays, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    momentum = {name: torch.zeros_like(p) for name, p in hidden.items()}
    for step in steps:
        model.zero_grad()
        next_token_loss(model(batch_of(step)[:, :-1]), batch_of(step)[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        for name, p in hidden.items():
            momentum[name] = MOMENTUM * momentum[name] + (1 - MOMENTUM) * p.grad
            update = MOMENTUM * momentum[name] + (1 - MOMENTUM) * p.grad
            parts = update.chunk(3) if "c_attn" in name else [update]
            update = torch.cat([0.2 * math.sqrt(max(g.shape)) * by_five_rounds(g) for g in parts])
            with torch.no_grad():
                p.copy_((1 - MUON_LR * DECAY) * p - MUON_LR * update)
    return dict(model.named_parameters())


def by_five_rounds(g):
    x = g / g.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    return x


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_those_of_a_plain_loop(engine_of, stage):
    engine = engine_of(f"zero_optimization.stage={stage}", "gradient_clipping=1.0")
    set_rates(engine)
    torch.manual_seed(1234)  # megagpt.seed
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=16), VOCAB)
    expected = plain_muon(model, range(3))
    found = weights_of(take_steps(engine, 0, 1, 2))
    for name, weight in expected.items():
        assert torch.allclose(found[name].view_as(weight), weight, atol=2e-5), name


def set_rates(engine):
    for group in engine.optimizer.param_groups:
        group["lr"] = MUON_LR if "momentum" in group else LR


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_scales_the_momentum_and_not_the_orthogonalized_step(engine_of, stage):
    """In the first step no momentum is there yet, so that the scale of the gradient does not matter."""
    engines = [engine_of(f"zero_optimization.stage={stage}", f"gradient_clipping={clip}") for clip in (0.0, 0.01)]
    for engine in engines:
        set_rates(engine)
        take_steps(engine, 0)
    free, clipped = map(whole_state, engines)
    norms = [float(engine.get_global_grad_norm()) for engine in engines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # as it was before clipping
    for name in (name for name in free if name.startswith("h.") and len(free[name]) == 2):
        assert torch.allclose(free[name][0], clipped[name][0], atol=1e-5), name
        assert torch.allclose(free[name][1] * 0.01 / norms[0], clipped[name][1], rtol=1e-3, atol=1e-9), name


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_update_that_the_guards_leave_out_leaves_no_trace(engine_of, stage):
    straight, engine = (engine_of(f"zero_optimization.stage={stage}") for _ in range(2))
    skipped = torch.zeros(())
    before_update(engine, lambda optimizer, norm: setattr(optimizer, "found_inf", skipped))
    for each in (straight, engine):
        set_rates(each)
    take_steps(straight, 0, 2)
    take_steps(engine, 0)
    before = {name: [x.clone() for x in state] for name, state in whole_state(engine).items()}
    skipped.fill_(1.0)
    take_steps(engine, 1)
    for name, state in whole_state(engine).items():
        assert all(torch.equal(a, b) for a, b in zip(state, before[name], strict=True)), name
    skipped.zero_()
    take_steps(engine, 2)
    expected = whole_state(straight)
    for name, state in whole_state(engine).items():
        assert all(torch.equal(a, b) for a, b in zip(state, expected[name], strict=True)), name


def test_a_gradient_that_is_not_finite_does_not_reach_what_is_kept(engine_of):
    engine = take_steps(engine_of("zero_optimization.stage=0"), 0)
    before = copy.deepcopy(whole_state(engine))
    for p in engine.module.parameters():
        p.grad = torch.full_like(p, torch.nan)
    engine.basic_optimizer.found_inf = torch.ones(())
    engine.basic_optimizer.step()
    for name, state in whole_state(engine).items():
        assert all(torch.equal(a, b) for a, b in zip(state, before[name], strict=True)), name


def test_both_rates_follow_the_schedule(engine_of, tmp_path):
    engine = engine_of()
    params = debug_run(tmp_path, tmp_path, *MUON).deepspeed.optimizer.params
    decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
    set_step(engine, params, lr_factor=0.5, weight_decay_factor=0.25, momentum=0.875)
    assert learning_rates(engine) == {"lr": 0.5 * LR, "muon_lr": 0.5 * MUON_LR}
    groups = engine.basic_optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.25 * decay for decay in decays]
    assert 0.0 in decays
    assert [group.get("momentum") for group in groups] == [None] * (len(groups) - 1) + [0.875]


def test_muon_has_the_blocks_matrices_and_adam_everything_else():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, seq_len=4), VOCAB)
    names = {p: name for name, p in model.named_parameters()}
    *adam, muon = decay_groups(model, 0.1, momentum=0.95)
    hidden = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {names[p] for p in muon["params"]} == {f"h.{i}.{part}.weight" for i in range(2) for part in hidden}
    assert {names[p] for p in adam[0]["params"]} == {"wte.weight", "wpe.weight"}
    assert ["momentum" in group for group in adam] == [False, False]


def test_what_a_layer_computes_at_once_is_orthogonalized_apart():
    """Queries and fewer keys and values, of four heads of width 8; the gate of a gated MLP."""
    model = GPT(ModelConfig(n_layer=1, n_head=4, n_kv_head=1, n_embd=32, seq_len=4, mlp="swiglu", mlp_width=40), VOCAB)
    found = {name: fused_rows(name, len(p), model.cfg) for name, p in model.h[0].named_parameters() if p.ndim == 2}
    assert found == {
        "attn.c_attn.weight": [32, 8, 8],
        "attn.c_proj.weight": [32],
        "mlp.c_fc.weight": [40, 40],
        "mlp.c_proj.weight": [32],
    }
    assert sum(map(len, (p for p in model.h[0].parameters() if p.ndim == 2))) == sum(map(sum, found.values()))
    assert sorted(rows for rows, _ in hidden_matrices(model.cfg)) == sorted(chain(*found.values()))


def test_a_rank_with_no_part_of_a_divided_matrix_takes_part_in_the_exchange_of_the_others():
    """Else these would wait for it. Four ranks at stage 1: matrix b lies on ranks 0 and 1, the others are whole."""
    shapes = {name: torch.Size([4, 4]) for name in "abcde"}
    slices = [
        [ParamSlice("a", 0, 16, 0), ParamSlice("b", 0, 4, 16)],
        [ParamSlice("b", 4, 12, 0), ParamSlice("c", 0, 16, 12)],
        [ParamSlice("d", 0, 16, 0)],
        [ParamSlice("e", 0, 16, 0)],
    ]
    found = [matrices_of(shapes, {name: [4] for name in shapes}, slices, rank) for rank in range(4)]
    assert [matrices.exchanged for matrices in found] == [True] * 4
    assert [[piece.name for piece in matrices.here] for matrices in found] == [["a"], ["c"], ["d"], ["e"]]
    for sender in range(4):
        for receiver in range(4):
            assert found[sender].sent[receiver] == found[receiver].received[sender]


@pytest.mark.parametrize(
    "other",
    [
        ["zero_optimization.stage=0"],
        ["zero_optimization.stage=2"],
        ["zero_optimization.stage=3", "zero_optimization.sub_group_size=3000"],
        ["zero_optimization.stage=0", "bf16.enabled=true"],
        ["zero_optimization.stage=1", "bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
    ],
    ids=lambda options: " ".join(option.split(".")[-1] for option in options),
)
def test_another_layout_takes_over_every_bit_and_trains(dataset, device, tmp_path, other):
    """With fp32 accumulation of bf16 gradients DeepSpeed's Muon would make steps of SGD, hundreds of times as large."""
    muon = options(1, *MUON)
    train(debug_run(dataset, tmp_path / "run", *muon), device, stop_at=2)
    expected = whole_state(opened(dataset, tmp_path / "run", *muon))
    there = opened(dataset, tmp_path / "run", *muon, *other)
    found = whole_state(there)
    assert {len(state) for state in found.values()} == {2, 3}
    for name, state in found.items():
        assert all(torch.equal(a, b) for a, b in zip(state, expected[name], strict=True)), name
    name = "h.0.mlp.c_fc.weight"
    set_rates(there)
    take_steps(there, *range(there.gradient_accumulation_steps()))
    step = weights_of(there)[name] - found[name][0] * (1 - MUON_LR * DECAY)
    assert root_mean_square(step) == pytest.approx(0.2 * MUON_LR, rel=0.2)
