"""Published peak rates and memory of GPUs, by name."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s (without sparsity), GiB of memory, GB/s to other GPUs each way."""

    peak_flops: float
    memory_gib: float
    link_gb_s: float  # NVLink where it has one, else PCI Express


# Keys are words of the names that torch.cuda.get_device_name gives; the first key whose words are all in a name wins.
# Peaks are those of NVIDIA's data sheets; memory (as the driver shows it) and links (one way) were not compared with
# them again.
GPUS = {
    "B200": Gpu(2250e12, 178, 900),
    "H200": Gpu(989e12, 139, 450),
    "H100 PCIe": Gpu(756e12, 79, 64),
    "H100 NVL": Gpu(835e12, 93, 300),
    "H100": Gpu(989e12, 79, 450),
    "A100 40GB": Gpu(312e12, 39, 300),
    "A100": Gpu(312e12, 79, 300),
    "L40S": Gpu(362e12, 44, 32),
    "A10G": Gpu(70e12, 22, 32),
    "RTX 4090": Gpu(165e12, 23, 32),
    "RTX 3090": Gpu(71e12, 23, 32),
    "V100 16GB": Gpu(125e12, 15, 150),
    "V100": Gpu(125e12, 31, 150),
}


def gpu_named(device_name: str) -> str | None:
    """Return the key in GPUS, or None: an unknown device gets no figures rather than a guess."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    return next((name for name in GPUS if words.issuperset(name.lower().split())), None)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of one device in FLOP/s, or None if the device is unknown."""
    name = gpu_named(device_name)
    return None if name is None else GPUS[name].peak_flops
