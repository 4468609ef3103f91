"""Train in bf16 on a CPU only where it has instructions for it."""

import platform

import torch

from megagpt.config.run_file import RunConfig
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import print_rank0


def multiplies_bf16() -> bool:
    """Tell whether this CPU has instructions for bf16. torch's emulation was measured 7 times slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def with_supported_dtype(run: RunConfig, device: torch.device) -> RunConfig:
    """Return the run with fp32 in place of bf16 where a CPU would emulate bf16, and print so. Collective."""
    ds = run.deepspeed
    if device.type != "cpu" or not ds.bf16.enabled or ds.fp16.enabled:  # with both, DeepSpeed refuses the run file
        return run
    if all(gather_objects(multiplies_bf16())):
        return run
    print_rank0("bf16.enabled=true, but this CPU has no instructions for bf16: training in fp32, which is faster here")
    return run.changed("bf16.enabled=false")
