"""Weights of linear layers in the layout of oneDNN's kernels, for generation on a CPU.

torch's kernels for few rows read a matrix at half the speed of memory; oneDNN's, for a weight that was laid out once,
take about half their time, and many rows of fp32 gain as much. torch.compile does the same with frozen weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from megagpt.model.gpt import GPT
from megagpt.model.layers import Linear

DTYPES = (torch.float32, torch.bfloat16)
WORTH = 16  # steps that save the time of packing


@contextmanager
def packed_weights(model: GPT, *, steps: int) -> Iterator[None]:
    """Let a model's linear layers compute with packed copies of their weights, which must not change meanwhile.

    Nothing is packed for fewer steps than are worth it, on another device, with other number types, where this torch
    has no oneDNN, and where the copies would take half of the memory that is free.
    """
    weight = model.wte.weight
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)] if steps >= WORTH else []
    n_bytes = sum(layer.weight.nbytes for layer in layers)
    usable = weight.device.type == "cpu" and weight.dtype in DTYPES and torch.backends.mkldnn.is_available()
    if not usable or 2 * n_bytes > psutil.virtual_memory().available:
        layers = []
    try:
        with torch.no_grad():
            for layer in layers:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, None)
        yield
    finally:
        for layer in layers:
            layer.packed = None
