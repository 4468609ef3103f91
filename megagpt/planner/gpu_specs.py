"""Published peak rates and memory of GPUs, by name."""

import re
from dataclasses import dataclass, replace

from megagpt.errors import UserError

# The fp32 peak as a share of the 16-bit peak: 19.5 of 312 TFLOP/s on an A100.
FP32_PEAK = 1 / 16
# The fastest product as a share of the peak. Those below are measured (Bekman, Machine Learning Engineering, "Maximum
# Achievable Matmul FLOPS": H100 80 %, B200 78 %, GH200 84 %, A100 87 %, MI300X 51 %, MI325X 60 %, MI250X 77 %); of
# others it is as an H100's, and of the same chip's variants the same.
BEST_PRODUCT = 0.803
# Attention's kernel as a share of the peak, forward and backward together. FlashAttention-2 reaches 50 to 73 % of an
# A100's forward and less backward (Dao 2023, abstract). In steps of DeepSpeed FlashAttention-3 reached 447 TFLOP/s of
# six products on an H200, and FlashAttention-4 834 on a B200 (the same book, "When Is It Worth Upgrading GPUs?"), and
# here seven are counted; cuDNN's, which megagpt takes on Hopper, are as fast.
ATTENTION, ON_HOPPER, ON_BLACKWELL = 0.45, 0.52, 0.43
# FLOPs of the peak for each byte of the memory's bandwidth, of a GPU whose bandwidth is not given: 153 of an A100, 164
# of an RTX 4090, 295 of an H100.
FLOPS_PER_BYTE = 200


@dataclass(frozen=True)
class Gpu:
    """Dense 16-bit FLOP/s (without sparsity), GiB of memory, GB/s to other GPUs each way and to its own memory."""

    peak_flops: float
    memory_gib: float
    link_gb_s: float  # NVLink or Infinity Fabric where it has one, else PCI Express
    memory_gb_s: float | None = None
    fp32_share: float = FP32_PEAK  # of peak_flops, in fp32
    bf16: bool = True
    best_product: float = BEST_PRODUCT
    attention: float = ATTENTION

    @property
    def bandwidth(self) -> float:
        """Bytes/s of its memory, reading and writing together; where it is not known, what is usual for its peak."""
        return self.peak_flops / FLOPS_PER_BYTE if self.memory_gb_s is None else 1e9 * self.memory_gb_s


# Keys are words of the names that torch.cuda.get_device_name gives; the first key whose words are all in a name wins.
# Peaks are those of matrix units that add in fp32, as torch does: of data sheets for data centers and workstations; for
# GeForce of appendix A of NVIDIA's white papers on Turing, Ampere GA102, Ada and Blackwell, which is twice (Turing four
# times) the fp32 rate; for AMD of its data sheets, for each of the two devices that a MI250 shows. A sheet with
# sparsity is halved. Memory is as the driver shows it, and links are one way; they and the memory's bandwidth were not
# compared with sheets again.
GPUS = {
    "GB200": Gpu(2500e12, 184, 900, 8000, best_product=0.776, attention=ON_BLACKWELL),
    "B200": Gpu(2250e12, 178, 900, 8000, best_product=0.776, attention=ON_BLACKWELL),
    "GH200": Gpu(989e12, 94, 450, 4000, best_product=0.836, attention=ON_HOPPER),
    "H200": Gpu(989e12, 139, 450, 4800, attention=ON_HOPPER),
    "H100 PCIe": Gpu(756e12, 79, 64, 2000, attention=ON_HOPPER),
    "H100 NVL": Gpu(835e12, 93, 300, 3900, attention=ON_HOPPER),
    "H100": Gpu(989e12, 79, 450, 3350, attention=ON_HOPPER),
    "H800": Gpu(989e12, 79, 200, 3350, attention=ON_HOPPER),
    "H20": Gpu(148e12, 95, 450, 4000, attention=ON_HOPPER),
    "A100 40GB": Gpu(312e12, 39, 300, 1555, best_product=0.869),
    "A100": Gpu(312e12, 79, 300, 2039, best_product=0.869),
    "A800": Gpu(312e12, 79, 200, 2039, best_product=0.869),
    "L40S": Gpu(362e12, 44, 32, 864, 1 / 4),
    "L40": Gpu(181e12, 44, 32, 864, 1 / 4),
    "L4": Gpu(121e12, 22, 32, 300, 1 / 4),
    "A40": Gpu(150e12, 44, 56, 696, 1 / 4),
    "A30": Gpu(165e12, 23, 100, 933),
    "A10G": Gpu(70e12, 22, 32, 600, 1 / 2),
    "A10": Gpu(125e12, 22, 32, 600, 1 / 4),
    "T4": Gpu(65e12, 15, 16, 320, 1 / 8, bf16=False),
    "V100 16GB": Gpu(125e12, 15, 150, 900, 1 / 8, bf16=False),
    "V100": Gpu(125e12, 31, 150, 900, 1 / 8, bf16=False),
    "RTX PRO 6000": Gpu(503e12, 95, 64, 1792, 1 / 4),
    "RTX 6000 Ada": Gpu(364e12, 47, 32, 960, 1 / 4),
    "RTX 5000 Ada": Gpu(261e12, 31, 32, 576, 1 / 4),
    "RTX A6000": Gpu(155e12, 47, 56, 768, 1 / 4),
    "RTX A5000": Gpu(111e12, 23, 56, 768, 1 / 4),
    "RTX A4000": Gpu(77e12, 15, 32, 448, 1 / 4),
    "Quadro RTX 8000": Gpu(131e12, 47, 50, 672, 1 / 8, bf16=False),
    "Quadro RTX 6000": Gpu(131e12, 23, 50, 672, 1 / 8, bf16=False),
    "TITAN RTX": Gpu(131e12, 23, 50, 672, 1 / 8, bf16=False),
    "RTX 5090": Gpu(210e12, 31, 64, 1792, 1 / 2),
    "RTX 5080": Gpu(113e12, 15, 64, 960, 1 / 2),
    "RTX 5070 Ti": Gpu(88e12, 15, 64, 896, 1 / 2),
    "RTX 5070": Gpu(62e12, 11.5, 64, 672, 1 / 2),
    "RTX 5060 Ti": Gpu(47e12, 15, 32, 448, 1 / 2),
    "RTX 5060": Gpu(38e12, 7.5, 32, 448, 1 / 2),
    "RTX 4090": Gpu(165e12, 23, 32, 1008, 1 / 2),
    "RTX 4080 SUPER": Gpu(104e12, 15, 32, 736, 1 / 2),
    "RTX 4080": Gpu(97e12, 15, 32, 717, 1 / 2),
    "RTX 4070 Ti SUPER": Gpu(88e12, 15, 32, 672, 1 / 2),
    "RTX 4070 Ti": Gpu(80e12, 11.5, 32, 504, 1 / 2),
    "RTX 4070 SUPER": Gpu(71e12, 11.5, 32, 504, 1 / 2),
    "RTX 4070": Gpu(58e12, 11.5, 32, 504, 1 / 2),
    "RTX 4060 Ti": Gpu(44e12, 7.5, 16, 288, 1 / 2),
    "RTX 4060": Gpu(30e12, 7.5, 16, 272, 1 / 2),
    "RTX 3090 Ti": Gpu(80e12, 23, 32, 1008, 1 / 2),
    "RTX 3090": Gpu(71e12, 23, 32, 936, 1 / 2),
    "RTX 3080 Ti": Gpu(68e12, 11.5, 32, 912, 1 / 2),
    "RTX 3080": Gpu(60e12, 9.5, 32, 760, 1 / 2),
    "RTX 3070 Ti": Gpu(43e12, 7.5, 32, 608, 1 / 2),
    "RTX 3070": Gpu(41e12, 7.5, 32, 448, 1 / 2),
    "RTX 3060 Ti": Gpu(32e12, 7.5, 32, 448, 1 / 2),
    "RTX 3060": Gpu(25e12, 11.5, 32, 360, 1 / 2),
    "RTX 3050": Gpu(18e12, 7.5, 16, 224, 1 / 2),
    "RTX 2080 Ti": Gpu(54e12, 10.5, 16, 616, 1 / 4, bf16=False),
    "RTX 2080 SUPER": Gpu(45e12, 7.5, 16, 496, 1 / 4, bf16=False),
    "RTX 2080": Gpu(40e12, 7.5, 16, 448, 1 / 4, bf16=False),
    "RTX 2070 SUPER": Gpu(36e12, 7.5, 16, 448, 1 / 4, bf16=False),
    "RTX 2070": Gpu(30e12, 7.5, 16, 448, 1 / 4, bf16=False),
    "RTX 2060 SUPER": Gpu(29e12, 7.5, 16, 448, 1 / 4, bf16=False),
    "RTX 2060": Gpu(26e12, 5.6, 16, 336, 1 / 4, bf16=False),
    "MI355X": Gpu(2516e12, 287, 538, 8000, 1 / 8),
    "MI325X": Gpu(1307e12, 255, 448, 6000, 1 / 8, best_product=0.604),
    "MI300X": Gpu(1307e12, 191, 448, 5300, 1 / 8, best_product=0.514),
    "MI250X": Gpu(191e12, 63, 200, 1638, 1 / 8, best_product=0.767),
    "MI250": Gpu(181e12, 63, 200, 1638, 1 / 8, best_product=0.767),
    "MI210": Gpu(181e12, 63, 150, 1638, 1 / 8, best_product=0.767),
}
# GB/s between GPUs of which only memory and peak are known.
PCI_EXPRESS_4 = 32.0
# Words that people leave out, and that only tell the maker.
IDLE = {"nvidia", "amd", "geforce", "tesla", "instinct", "rtx"}


def gpu_named(device_name: str) -> str | None:
    """Return the key in GPUS, or None: an unknown device gets no figures rather than a guess, and so does a laptop's.

    "RTX3060", "4070ti" and "3060" are taken, too.
    """
    words = _words(device_name)
    if words & {"laptop", "mobile"} or {"max", "q"} <= words:
        return None
    return next((name for name in GPUS if words - IDLE >= _words(name) - IDLE), None)


def gpu_of(name: str | None, gib: float | None, tflops: float | None) -> tuple[str, Gpu]:
    """Return the GPU of this name, or one of this memory and peak, which otherwise replace the named one's.

    Raises UserError for a name that is not known, and for one of the two numbers without a name.
    """
    if name is None:
        if gib is None or tflops is None:
            given, other = ("--gpu-memory", "--tflops") if tflops is None else ("--tflops", "--gpu-memory")
            raise UserError(f"{given} alone describes no GPU; give {other} too, or --gpu NAME")
        return "GPU", Gpu(tflops * 1e12, gib, PCI_EXPRESS_4)
    if name.lower() == "cpu":
        raise UserError(
            "--gpu 'cpu' is none: `megagpt plan` counts GPUs alone; for a CPU, give --probe, which takes real steps, "
            "or let `megagpt init DATA --cpu` choose what fits"
        )
    if (known := gpu_named(name)) is None:
        raise UserError(
            f"--gpu {name!r} is not known; give --gpu-memory GIB and --tflops T of its data sheet instead; "
            f"known are {', '.join(GPUS)}"
        )
    gpu = GPUS[known]
    return known, replace(gpu, memory_gib=gib or gpu.memory_gib, peak_flops=tflops * 1e12 if tflops else gpu.peak_flops)


def _words(name: str) -> set[str]:
    """Split a name, also where "RTX" precedes a number and "Ti" or "SUPER" follow one."""
    apart = re.sub(r"(?<=\d)(?=ti|super)|(?<=\dti)(?=super)|(?<=rtx)(?=[\da])", " ", name.lower())
    return set(re.findall(r"[a-z0-9]+", apart))


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of one device in FLOP/s, or None if the device is unknown."""
    name = gpu_named(device_name)
    return None if name is None else GPUS[name].peak_flops
