import pytest
import torch
from pydantic import ValidationError

from megagpt.config.model import ModelConfig
from megagpt.config.schedule import ScheduleConfig
from megagpt.engine.optimizer import decay_groups
from megagpt.model.gpt import GPT
from megagpt.train.lr_schedule import lr_factor, muon_momentum, weight_decay_factor


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


def test_inverse_sqrt_by_hand():
    factors = curve(max_steps=10, warmup_steps=2, shape="inverse-sqrt", min_lr_ratio=0.5)
    assert factors == pytest.approx([0.5, 1.0, *((2 / n) ** 0.5 for n in (3, 4, 5, 6, 7)), 0.5, 0.5, 0.5])


def test_decay_from_is_the_other_end_of_decay_steps():
    late = curve(max_steps=10, warmup_steps=1, shape="warmup-stable-decay", decay_from=6)
    assert late == curve(max_steps=10, warmup_steps=1, shape="warmup-stable-decay", decay_steps=4)
    assert late[5:] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])


def test_weight_decay_and_momentum_by_hand():
    cfg = ScheduleConfig(
        max_steps=4, shape="linear", min_lr_ratio=0.0, weight_decay_shape="linear", momentum_warmup_steps=2
    )
    assert [weight_decay_factor(step, cfg) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert [muon_momentum(step, 0.95, cfg) for step in range(4)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    with_rate = cfg.model_copy(update={"weight_decay_shape": "lr"})
    assert [weight_decay_factor(step, with_rate) for step in range(3)] == [lr_factor(step, cfg) for step in range(3)]
    assert weight_decay_factor(3, with_rate) > 0.0  # a group with 0 never decays


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"shape": "cosine", "decay_from": 3}, "shape='cosine'; it is for 'warmup-stable-decay'"),
        ({"shape": "warmup-stable-decay", "decay_from": 3, "decay_steps": 3}, "decay_steps=3; it is for"),
        ({"shape": "warmup-stable-decay", "decay_from": 10}, "and the last step, 10; change it"),
        ({"shape": "warmup-stable-decay", "decay_from": 1, "warmup_steps": 2}, "the warm-up, which ends at step 2"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(schedule, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(max_steps=10, **schedule)


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


@pytest.mark.parametrize("momentum", [None, 0.95])
@pytest.mark.parametrize("lr_scale", [None, {"scalars": 5.0}])
def test_scalars_of_shortcuts_never_decay_and_have_a_rate_of_their_own(lr_scale, momentum):
    cfg = ModelConfig(n_layer=3, n_head=2, n_embd=32, seq_len=8, value_residual=True, embedding_shortcut=True)
    model = GPT(cfg, 128)
    groups = decay_groups(model, 0.1, "all", lr_scale=lr_scale, momentum=momentum)
    scalars = {id(p) for name, p in model.named_parameters() if name.endswith(".scalars")}
    assert len(scalars) == 4
    [group] = [group for group in groups if scalars & {id(p) for p in group["params"]}]
    assert {id(p) for p in group["params"]} == scalars
    assert group["weight_decay"] == 0.0
    assert group.get("lr_scale") == (lr_scale and 5.0)
    assert "momentum" not in group
