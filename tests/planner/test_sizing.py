from dataclasses import replace

import pytest

from megagpt.config.run_file import SECTION
from megagpt.errors import UserError
from megagpt.lint.linter import lint, notes
from megagpt.model.flops import flops_per_token
from megagpt.planner.estimate import CPU_EFFICIENCY, Machine, machine
from megagpt.planner.gpu_specs import FP32_PEAK, Gpu
from megagpt.planner.network import network_of
from megagpt.planner.sizing import EPOCHS, LARGEST_BATCH, SHAPES, Data, choose

H100 = machine("H100", 1, None)
V100 = machine("V100 16GB", 1, None)
LAPTOP = Machine("cpu", Gpu(1e11 / FP32_PEAK, 8, 1.0), 1, network_of(None, 1, 1.0), CPU_EFFICIENCY)
DEMO = Data("data/demo", 11_787_626, 600_000, 2048)
WEB = Data("data/web", 10**10, 10**7, 50304)
SETTINGS = [
    pytest.param(data, on, dtype, hours, id=f"{data.path}, {on.name}, {hours} hours")
    for data in (DEMO, WEB, replace(DEMO, train_tokens=66, val_tokens=66), replace(WEB, val_tokens=200))
    for on, dtype in ((H100, "bf16"), (V100, "fp16"), (LAPTOP, "fp32"))
    for hours in (0.001, 1.0, 1000.0)
]


def test_the_demos_data_gets_the_demos_model():
    """11.8 million tokens, four times, are 20 tokens for each of 2.36 million parameters."""
    choice, refused = choose(DEMO, LAPTOP, "fp32", 10.0)
    assert (choice.shape.n_layer, choice.shape.n_embd, choice.params) == (4, 192, 2_197_632)
    assert choice.tokens == pytest.approx(20 * 2_197_632, rel=1e-3)
    assert refused.against == "wants 230,645,760 tokens, and 4 epochs of this data are 47,150,504"


def test_ten_billion_tokens_and_a_thousand_hours_of_an_h100_are_gpt2_small_and_more():
    """20 tokens a parameter of GPT-2 medium are 7.1 billion, of large 15.5 billion, where four epochs have 40."""
    choice, refused = choose(WEB, H100, "bf16", 1000.0)
    assert choice.shape.n_layer == 48
    assert refused is None
    one_hour, larger = choose(WEB, H100, "bf16", 1.0)
    assert one_hour.shape.n_layer < 24
    assert "hours, and --hours is 1" in larger.against


def test_hours_are_flops_over_the_speed():
    """At 100 GFLOP/s, of which 40 % are reached."""
    choice, _ = choose(DEMO, LAPTOP, "fp32", 10.0)
    assert choice.hours == pytest.approx(choice.tokens * flops_per_token(choice.shape.model, 2048) / 4e10 / 3600)


@pytest.mark.parametrize(("data", "on", "dtype", "hours"), SETTINGS)
def test_every_choice_keeps_to_its_limits_and_lint_has_nothing_to_say(data, on, dtype, hours):
    choice, refused = choose(data, on, dtype, hours)
    run = choice.run("runs/x")
    assert [*lint(run), *notes(run)] == []
    assert choice.epochs <= EPOCHS or choice.steps == 1
    assert choice.tokens <= 20 * choice.params or choice.steps == 1
    assert choice.hours <= hours or choice.steps == 1
    assert choice.tokens_per_step <= LARGEST_BATCH
    assert choice.batch % choice.micro_batch == 0
    assert choice.estimate.fits
    assert choice.shape.seq_len < min(data.train_tokens, data.val_tokens)
    assert refused is None or refused.params > choice.params
    assert choice.shape == SHAPES[0] or not choice.against
    # The end is one of the evaluations and saves, and none comes right before it.
    every = run.megagpt.every
    assert choice.steps < 20 or (choice.steps / every.eval, choice.steps / every.save) == (10, 4)
    # What an evaluation reads is there, in whole windows.
    val_tokens = choice.as_raw("runs/x")[SECTION]["data"]["val_tokens"]
    assert val_tokens is None or (val_tokens < data.val_tokens and val_tokens % choice.shape.seq_len == 0)


@pytest.mark.parametrize("hours", [0.1, 1.0, 10.0, 100.0])
def test_more_time_or_more_data_never_makes_the_model_smaller(hours):
    for n_tokens in (10**5, 10**7, 10**9):
        data = replace(WEB, train_tokens=n_tokens)
        params = choose(data, H100, "bf16", hours)[0].params
        assert choose(data, H100, "bf16", 2 * hours)[0].params >= params
        assert choose(replace(data, train_tokens=2 * n_tokens), H100, "bf16", hours)[0].params >= params


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_without_one_sequence_is_refused(split):
    data = replace(DEMO, **{f"{split}_tokens": 64})
    with pytest.raises(UserError, match=f"data/demo has 64 tokens in its '{split}' split.* reads 65 at a time"):
        choose(data, LAPTOP, "fp32", 1.0)
