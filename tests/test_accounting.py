import pytest

from megagpt.accounting import (
    causal_flops_per_token,
    flops_per_token,
    n_params,
    peak_flops,
    recompute_flops_per_token,
)
from megagpt.config import ModelConfig
from megagpt.model import GPT

SIZES = {  # (n_layer, n_head, n_embd) -> parameters with GPT-2's own vocabulary of 50,257 and 1,024 positions
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_gpt2s_four_sizes(size):
    n_layer, n_head, n_embd = size
    assert n_params(ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd), 50257) == SIZES[size]


def test_parameters_equal_the_models():
    cfg = ModelConfig(n_layer=3, n_head=2, n_embd=24, seq_len=10)
    assert n_params(cfg, 128) == sum(p.numel() for p in GPT(cfg, 128).parameters())


def test_flops_of_gpt2_124m():
    """0.855 GFLOP per token with the vocabulary padded to 50,304: 6 x 123.65M + 12 x 12 x 768 x 1024."""
    assert flops_per_token(ModelConfig(), 50304) == pytest.approx(0.8552e9, rel=1e-3)


def test_causal_flops_of_gpt2_124m():
    """0.799 GFLOP: a query looks at half of the positions on average, so attention's 0.113 GFLOP are halved."""
    assert causal_flops_per_token(ModelConfig(), 50304) == pytest.approx(0.7986e9, rel=1e-3)


def test_recomputing_every_block_adds_a_third_of_the_blocks_flops():
    cfg = ModelConfig(n_layer=48, n_head=25, n_embd=1600)
    without_head = flops_per_token(cfg, 0)
    assert recompute_flops_per_token(cfg, 48) == pytest.approx(without_head / 3, rel=0.001)


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some GPU 9000") is None
