import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config.model import ModelConfig
from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import RegularizationConfig
from megagpt.model import products
from megagpt.model.flops import causal_flops_per_token, flops_per_token, n_params, recompute_flops_per_token
from megagpt.model.gpt import GPT
from megagpt.model.recompute import recompute_blocks
from megagpt.planner.gpu_specs import gpu_named, peak_flops

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


LADDER = [{"policy": "none"}, {"policy": "selective"}, {"policy": "every_k", "k": 2}, {"policy": "full"}]


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize(
    "dropout", [{}, {"dropout": 0.1}, {"attention_dropout": 0.1}, {"residual_dropout": 0.1}], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", LADDER, ids=lambda policy: policy["policy"])
def test_recomputed_flops_are_those_that_torch_counts(policy, attention, dropout, zero3, monkeypatch):
    linear = zero3_linear_wrap if zero3 else torch._C._nn.linear  # zero.Init puts its own there for good
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    cfg = ModelConfig(n_layer=3, n_head=2, n_embd=32, seq_len=16, attention=attention)
    recompute = RecomputeConfig(**policy)
    rates = RegularizationConfig(**dropout)
    plain, again = (flops_of_a_step(cfg, rates, chosen) for chosen in (RecomputeConfig(), recompute))
    n_tokens = 2 * 16
    assert again - plain == n_tokens * recompute_flops_per_token(cfg, recompute, dropout=rates.dropouts, zero3=zero3)


def flops_of_a_step(cfg: ModelConfig, rates: RegularizationConfig, recompute: RecomputeConfig) -> int:
    torch.manual_seed(0)
    model = GPT(cfg, 128, rates)
    model.recompute = recompute_blocks(recompute, rates.dropouts)
    with Flops() as counted:
        model(torch.zeros(2, 16, dtype=torch.int64)).sum().backward()
    return counted.total


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch):
    """oneDNN's have no formula in torch's table, and are saved after they are computed: recomputing stops later."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)


class Flops(TorchDispatchMode):
    """As torch counts each operation. (Its FlopCounterMode hooks into modules, so that recomputing stops later.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.total += flop_counter.sdpa_flop(*args[:3])
        elif (formula := flop_counter.flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def test_deepspeed_recomputes_a_block_to_its_end():
    """All of a block's forward pass, a third of what it costs in all."""
    cfg, full = ModelConfig(n_layer=48, n_head=25, n_embd=1600), RecomputeConfig(policy="full", kind="deepspeed")
    without_head = flops_per_token(cfg, 0)
    assert recompute_flops_per_token(cfg, full) == pytest.approx(without_head / 3, rel=0.001)


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some GPU 9000") is None
    assert gpu_named("NVIDIA A100-SXM4-40GB") == "A100 40GB"
    assert gpu_named("NVIDIA A100-SXM4-80GB") == "A100"
    assert gpu_named("Tesla V100-SXM2-16GB") == "V100 16GB"
    assert gpu_named("NVIDIA GH200 480GB") == "GH200"


def test_windows_are_counted_as_the_positions_that_are_seen():
    """Windows of 256 of 1024: a causal token sees 256 - 256 / 8 = 224 on average, of 512; every third sees all."""
    cfg = ModelConfig(n_layer=6, n_head=2, n_embd=64, seq_len=1024, sliding_window=256, sliding_window_pattern=3)
    whole = cfg.model_copy(update={"sliding_window": None, "sliding_window_pattern": None})
    assert cfg.windows == [256, 256, None] * 2
    saved = 4 * (512 - 224)
    assert causal_flops_per_token(whole, 128) - causal_flops_per_token(cfg, 128) == 12 * 64 * saved
    assert flops_per_token(whole, 128) - flops_per_token(cfg, 128) == 12 * 64 * 2 * saved
