"""Matrix products by the faster of torch's two libraries for CPUs.

torch leaves fp32 products to MKL, which uses AVX-512 on Intel's processors only. oneDNN, which computes torch's 16-bit
products, uses it on AMD's too, and is more than twice as fast there. On such a processor, fp32 products are oneDNN's;
everywhere else these functions are torch's own.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@cache
def onednn_is_faster() -> bool:
    """Tell whether fp32 products are faster with oneDNN: on AMD's processors with AVX-512.

    It depends on the processor alone, never on a measurement, so that a resumed run computes as before.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Tell whether a product of these two is oneDNN's: not on a GPU, whatever processor its host has."""
    fp32_on_cpu = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    return fp32_on_cpu and a.numel() > 0 and onednn_is_faster() and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias: x (N, K), weight (M, K), bias (M,) -> (N, M)."""
    # torch.compile cannot trace the question; its compiled blocks keep torch's own products.
    if not torch.compiler.is_compiling() and by_onednn(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, without autograd: a (N, K), b (K, M) -> (N, M); or of as many pairs, (n, N, K) and (n, K, M)."""
    return _onednn(a, b.t()) if a.ndim == 2 and by_onednn(a, b) else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Return beta * total + alpha * a @ b, without autograd, of matrices or of as many pairs: (n, N, K), (n, K, M)."""
    if a.ndim == 2 and by_onednn(a, b):
        return product(a, b).mul_(alpha).add_(total, alpha=beta)
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(total, a, b, beta=beta, alpha=alpha)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if by_x else None,
            product(grad.t(), x) if by_weight else None,
            grad.sum(0) if by_bias else None,
        )
