import pytest
import torch

from megagpt.config.model import ModelConfig
from megagpt.config.schedule import ScheduleConfig
from megagpt.engine.optimizer import decay_groups
from megagpt.model.gpt import GPT
from megagpt.train.lr_schedule import lr_factor


def curve(**schedule) -> list[float]:
    cfg = ScheduleConfig(**schedule)
    return [lr_factor(step, cfg) for step in range(cfg.max_steps)]


def test_cosine_by_hand():
    assert curve(max_steps=5, warmup_steps=2, min_lr_ratio=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])


def test_linear_by_hand():
    assert curve(max_steps=5, shape="linear", min_lr_ratio=0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_constant_by_hand():
    assert curve(max_steps=3, shape="constant", warmup_steps=1) == [1.0, 1.0, 1.0]


def test_warmup_stable_decay_by_hand():
    factors = curve(max_steps=6, warmup_steps=2, shape="warmup-stable-decay", decay_steps=2, min_lr_ratio=0.0)
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("shape", ["cosine", "linear", "warmup-stable-decay"])
def test_the_last_update_has_the_lowest_rate_and_further_steps_keep_it(shape):
    decay = {"decay_steps": 10} if shape == "warmup-stable-decay" else {}
    cfg = ScheduleConfig(max_steps=40, warmup_steps=5, shape=shape, min_lr_ratio=0.1, **decay)
    assert lr_factor(39, cfg) == pytest.approx(0.1)
    assert lr_factor(1000, cfg) == pytest.approx(0.1)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, seq_len=4), 128)
    decays, others = decay_groups(model, 0.1)
    assert {p.ndim for p in decays["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decays["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_decay_on_all_leaves_one_group():
    groups = decay_groups(torch.nn.Linear(2, 2), 0.1, "all")
    assert [len(group["params"]) for group in groups] == [2]
