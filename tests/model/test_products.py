"""oneDNN's products and their gradients equal torch's own, on whichever processor."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.model import products


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 768])
def test_a_linear_layer_and_its_gradients_are_torchs(rows, bias):
    """Computed in fp64: sums of up to 768 products in fp32 are off by less than the tolerance."""
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(n, m, generator=generator) for n, m in ((rows, 128), (96, 128), (rows, 96)))
    leaves = [x, weight] + [torch.randn(96, generator=generator)] * bias
    found = []
    for function, dtype in ((products.linear, torch.float32), (F.linear, torch.float64)):
        copies = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        y = function(*copies)
        found.append([y, *torch.autograd.grad(y, copies, upstream.to(dtype))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 8))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_product_is_added_to_a_matrix_or_to_as_many(shape):
    a, b, total = torch.randn(*shape, 16, 32), torch.randn(*shape, 32, 24), torch.randn(*shape, 16, 24)
    torch.testing.assert_close(products.product(a, b), a @ b)
    wanted = 0.5 * total + 3.0 * (a @ b)
    torch.testing.assert_close(products.add_product(total, a, b, beta=0.5, alpha=3.0), wanted)


def test_autocast_computes_in_16_bits():
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(torch.randn(4, 8), torch.randn(6, 8)).dtype == torch.bfloat16


def test_products_of_another_device_or_type_are_torchs_own():
    """Also on a GPU in a machine with such a processor."""
    on_cpu = torch.ones(2, 2)
    assert products.by_onednn(on_cpu, on_cpu)
    assert not products.by_onednn(on_cpu.to("meta"), on_cpu.to("meta"))
    assert not products.by_onednn(on_cpu.bfloat16(), on_cpu.bfloat16())
