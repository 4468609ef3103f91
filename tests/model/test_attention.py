import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt.model.attention import backend_order, prefer_cudnn, sdpa_attention


def values_and_gradients(q, k, v):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = sdpa_attention(*inputs)
    return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]


@pytest.mark.parametrize("T", [64, 100])
def test_this_devices_fused_kernel_gives_the_values_and_gradients_of_the_formula(device, T):
    """On Hopper it is cuDNN's. bf16 keeps 8 bits, so its bound is 2^-7 of the largest entry."""
    prefer_cudnn(device)
    dtype, bound = (torch.bfloat16, 2**-7) if device.type == "cuda" else (torch.float32, 1e-5)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, T, 64, device=device).to(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        exact = values_and_gradients(q.float(), k.float(), v.float())
    for found, wanted in zip(values_and_gradients(q, k, v), exact, strict=True):
        assert (found.float() - wanted).abs().max() <= bound * wanted.abs().max()


def test_cudnn_is_tried_first_on_hopper_alone():
    usual = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert backend_order((8, 0)) == backend_order((10, 0)) == usual
    hopper = backend_order((9, 0))
    assert hopper[0] == SDPBackend.CUDNN_ATTENTION
    assert hopper[1:] == [backend for backend in usual if backend != SDPBackend.CUDNN_ATTENTION]
