"""The gradient noise scale: by hand, on data whose noise is known, and in the engine at every ZeRO stage."""

import pytest
import torch
from support import debug_run, metric

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.engine.build import build_engine
from megagpt.engine.micro_batch_norms import MicroBatchNorms
from megagpt.errors import UserError
from megagpt.lint.linter import lint_or_raise
from megagpt.metrics.noise_scale import noise_scale
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss, next_token_score
from megagpt.train.trainer import train

VOCAB = 128
TINY = ["train_batch_size=4", "train_micro_batch_size_per_gpu=2"]
MODEL = 'megagpt.model={"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16}'


def test_by_hand():
    """Two micro-batches of one sequence with gradients (3, 4) and (1, 0): their mean is (2, 2), whose square is 8, and
    the mean of their squares 13. |G|^2 = 2 * 8 - 13 = 3, tr(S) = (13 - 8) / (1 - 1/2) = 10."""
    small, big = torch.tensor([13.0, torch.nan]).double(), torch.tensor([8.0, 8.0]).double()
    two = torch.tensor([2.0, 2.0]).double()
    assert noise_scale(small, big, 1, two) == pytest.approx(10 / 3)
    assert noise_scale(small * 2, big, 1, two) is None  # the mean gradient is lost in the noise
    assert noise_scale(big / 2, big, 1, two) is None  # micro-batches that differ less than not at all
    assert noise_scale(small[1:], big[1:], 1, two[1:]) is None
    # the steps of a ramp that have one micro-batch tell nothing
    ramp = (torch.tensor(numbers).double() for numbers in ([9.0, 13.0], [9.0, 8.0]))
    assert noise_scale(*ramp, 1, torch.tensor([1.0, 2.0]).double()) == pytest.approx(10 / 3)


def test_it_is_the_ratio_that_gradients_were_drawn_with():
    """Gradients of mean (2, 0, ..., 0) and of variance 0.5 in each of 100 dimensions: 50 / 4."""
    draws = torch.randn(1000, 16, 100, generator=torch.Generator().manual_seed(0)).double() * 0.5**0.5
    draws[..., 0] += 2.0
    small = draws.unflatten(1, (4, 4)).mean(2).square().sum(-1).mean(1)  # batches of 4 sequences
    assert noise_scale(small, draws.mean(1).square().sum(-1), 4, torch.tensor(16.0).expand(1000)) == pytest.approx(
        12.5, rel=0.1
    )


def batch_of(number):
    return torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(number))


def squared_norm(model, *batches):
    model.zero_grad()
    for batch in batches:
        (next_token_loss(model(batch[:, :-1]), batch[:, 1:]) / len(batches)).backward()
    return sum(p.grad.square().sum().item() for p in model.parameters())


@pytest.mark.parametrize(
    "more",
    [
        ["zero_optimization.stage=0"],
        ["zero_optimization.stage=1"],
        ["zero_optimization.stage=2", "megagpt.recompute.policy=full", "megagpt.recompute.kind=deepspeed"],
        ["zero_optimization.stage=3", "gradient_clipping=0.01"],
    ],
    ids=["0", "1", "2", "3"],
)
def test_the_engine_gives_the_norms_of_a_plain_loop(dataset, device, tmp_path, more):
    run = debug_run(dataset, tmp_path / "run", *TINY, MODEL, *more)
    engine = build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)
    norms = MicroBatchNorms(engine, device, wanted=True)
    torch.manual_seed(1234)  # megagpt.seed
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=16), VOCAB)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(2):
        batches = [batch_of(2 * step), batch_of(2 * step + 1)]
        for batch in batches:
            engine.backward(engine(batch[:, :-1], score=next_token_score(batch[:, 1:])))
            engine.step()
        each = [squared_norm(model, batch) for batch in batches]
        assert norms.take().item() == pytest.approx(sum(each) / 2, rel=1e-4)
        assert float(engine.get_global_grad_norm()) ** 2 == pytest.approx(squared_norm(model, *batches), rel=1e-4)
    assert norms.take().item() == 0.0


def test_it_is_logged_if_asked_and_changes_nothing(dataset, device, tmp_path):
    few = [*TINY, "megagpt.schedule.max_steps=8", 'megagpt.every={"log": 4, "eval": 0, "save": 0}']
    for name, wanted in {"with": "true", "without": "false"}.items():
        train(debug_run(dataset, tmp_path / name, *few, f"megagpt.noise_scale={wanted}"), device)
    assert metric(tmp_path / "with", "train/loss") == metric(tmp_path / "without", "train/loss")
    found = metric(tmp_path / "with", "optim/noise_scale")
    assert found
    assert all(0.0 < value < 1000.0 for value in found.values())
    assert metric(tmp_path / "without", "optim/noise_scale") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fp16.enabled=true", "zero_optimization.stage=1"], "megagpt.noise_scale=true does not work with fp16"),
        (["sequence_parallel_size=2"], "megagpt.noise_scale=true does not work with sequence_parallel_size"),
    ],
)
def test_where_a_micro_batch_has_no_norm_it_is_refused(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        lint_or_raise(debug_run(dataset, tmp_path, "megagpt.noise_scale=true", *options))


def test_a_step_of_one_micro_batch_is_refused_with_the_way_out(dataset, device, tmp_path):
    options = ["megagpt.noise_scale=true", "train_batch_size=4", "megagpt.schedule.max_steps=5"]
    with pytest.raises(UserError, match=r"is all of train_batch_size; set train_micro_batch_size_per_gpu to 2, or"):
        train(debug_run(dataset, tmp_path, *options), device)
    train(debug_run(dataset, tmp_path, *options, "train_micro_batch_size_per_gpu=2"), device)
