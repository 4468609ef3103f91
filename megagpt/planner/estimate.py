"""Estimate the memory and time of a run file, for `megagpt plan`: by arithmetic, before anything is started.

Memory is counted by memory.py, traffic by communication.py and FLOPs by model/flops.py. This module has the settings
that are compared and a simple model of a step's time; report.py prints them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megagpt.config.batch import BatchPlan, batch_plan
from megagpt.config.model import ModelConfig
from megagpt.config.run_file import RunConfig
from megagpt.data.manifest import read_manifest
from megagpt.errors import UserError
from megagpt.model.flops import flops_per_token, hidden_matrices, n_params, recompute_flops_per_token
from megagpt.planner.communication import WIDTH, Traffic, traffic
from megagpt.planner.gpu_specs import Gpu, gpu_of
from megagpt.planner.memory import ADAM, Memory, memory
from megagpt.tokenizer.tokenizer import padded_vocab_size

GIB = 2**30
GPUS_PER_HOST = 8
ROUNDS_OF_MUON = 5  # ROUNDS of engine/muon.py
VOCABULARY = 50_257  # GPT-2's, where the data is not there to ask
# FLOP/s that are reached, as a share of the peak; published for GPT-2 on Hopper: 33 to 52 %.
EFFICIENCY = 0.4
# The backward pass's share of a step's FLOPs, without recomputation.
BACKWARD_SHARE = 2 / 3
# Gaps between the allocator's blocks, as a share of the tensors' bytes.
FRAGMENTATION = 0.1
# CUDA's context, kernels and NCCL's buffers.
CONTEXT = 1.0 * GIB
# Bytes/s between a GPU and its host, each way: PCI Express 4, 16 lanes, of which 80 % are reached.
HOST_LINK = 25e9
# Bytes/s of host memory for each GPU's share of an offloaded Adam, which reads and writes 28 bytes per parameter.
HOST_ADAM = 10e9

NETWORKS = {  # GB/s of each GPU, each way
    "infiniband-ndr": 50.0,  # 400 Gbit/s
    "infiniband-hdr": 25.0,  # 200 Gbit/s
    "ethernet-100": 12.5,
    "ethernet-25": 3.125,
    "ethernet-10": 1.25,
}

# What is offloaded -> the devices of offload_optimizer and offload_param.
WHERE = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}
STAGES = [(0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer")]
STAGES.append((3, "all"))
POLICIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Machine:
    """The GPUs of the plan and the network between them."""

    name: str
    gpu: Gpu
    ranks: int
    network: str
    gb_per_s: float
    efficiency: float = EFFICIENCY


@dataclass(frozen=True)
class Setting:
    """One way to run the run file: bytes per GPU, seconds per step."""

    stage: int
    offload: str
    policy: str
    micro_batch: int
    accumulation: int
    current: bool
    memory: Memory
    spare: float  # for fragmentation and CUDA itself
    traffic: Traffic
    compute_seconds: float
    wire_seconds: float
    host_seconds: float
    hidden_seconds: float  # the part of wire_seconds that runs during the compute
    fits: bool
    keys: tuple[str, ...] = field(default=(), compare=False)  # overrides that turn the run file into this setting

    @property
    def seconds(self) -> float:
        """Seconds of one optimizer step."""
        return self.compute_seconds + self.wire_seconds - self.hidden_seconds + self.host_seconds

    @property
    def total(self) -> float:
        """Bytes that one GPU needs at the worst moment."""
        return self.memory.total + self.spare


def without_bf16(run: RunConfig, gpu: Gpu) -> list[str]:
    """Return the overrides that train the run in fp16 on a GPU that has no bf16; none where it needs none."""
    if gpu.bf16 or run.deepspeed.dtype != "bf16":
        return []
    stage = ["zero_optimization.stage=1"] if run.deepspeed.zero_optimization.stage == 0 else []
    return ["bf16.enabled=false", "fp16.enabled=true", *stage]


def machine(
    gpu: str | None,
    ranks: int,
    network: str | None,
    efficiency: float = EFFICIENCY,
    *,
    gib: float | None = None,
    tflops: float | None = None,
) -> Machine:
    """Describe the machine that the command line names. Raises UserError for an unknown GPU or network.

    `network` is a name or GB/s per GPU each way; without it, up to 8 ranks use the GPUs' own links.
    """
    name, specs = gpu_of(gpu, gib, tflops)
    if network is None and ranks <= GPUS_PER_HOST:
        return Machine(name, specs, ranks, "the GPUs' own links", specs.link_gb_s, efficiency)
    network = network or "infiniband-ndr"
    try:
        speed = NETWORKS[network] if network in NETWORKS else float(network)
    except ValueError:
        speed = 0.0
    if not 0.001 <= speed <= 1e6:
        raise UserError(
            f"--network {network!r} is neither GB/s of each GPU nor one of {', '.join(NETWORKS)}; give a name, or "
            "a number from 0.001 to 1e6"
        )
    return Machine(name, specs, ranks, network if network in NETWORKS else "network", speed, efficiency)


def vocabulary(run: RunConfig) -> tuple[int, str]:
    """Return (padded vocabulary size, its source in words): the dataset's, or GPT-2's if there is no dataset yet."""
    path = run.megagpt.data.train[0].path
    try:
        return padded_vocab_size(read_manifest(path).tokenizer.vocab_size), f"of {path}"
    except UserError:
        return padded_vocab_size(VOCABULARY), f"GPT-2's, since {path} cannot be read"


def setting(run: RunConfig, on: Machine, vocab_size: int, *, current: bool = False) -> Setting:
    """Estimate the run as it is written. Raises UserError if its batch sizes do not multiply out on these ranks."""
    batch, zero = batch_plan(run.deepspeed, on.ranks), run.deepspeed.zero_optimization
    used = memory(run, batch, vocab_size, on_cpu=on.name == "cpu")
    sent = traffic(run, batch, vocab_size)
    spare = FRAGMENTATION * used.total + CONTEXT
    bandwidth, compute = on.gb_per_s * 1e9, _compute_seconds(run, batch, vocab_size, on)
    param = zero.offload_param.device != "none"
    offload = "all" if param else "optimizer" if zero.offload_optimizer.device != "none" else "none"
    return Setting(
        stage=zero.stage,
        offload=offload,
        policy=run.megagpt.recompute.policy,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        current=current,
        memory=used,
        spare=spare,
        traffic=sent,
        compute_seconds=compute,
        wire_seconds=sent.wire / bandwidth,
        host_seconds=_host_seconds(run, batch, vocab_size, offload),
        hidden_seconds=_hidden_seconds(run, batch, sent, compute, bandwidth),
        fits=used.total + spare <= on.gpu.memory_gib * GIB,
    )


def settings(run: RunConfig, on: Machine, vocab_size: int) -> Iterator[Setting]:
    """Estimate the run as it is written, then every stage, offload, policy and micro-batch with its global batch.

    fp16 does not train at stage 0 (lint/refused.py), and Muon not with offload.
    """
    yield setting(run, on, vocab_size, current=True)
    for micro_batch in micro_batches(run, on.ranks):
        for stage, offload in _trained(run):
            for policy in dict.fromkeys((*POLICIES, run.megagpt.recompute.policy)):
                keys = changes(run, stage, offload, policy, micro_batch)
                yield replace(setting(run.changed(*keys), on, vocab_size), keys=tuple(keys))


def _trained(run: RunConfig) -> list[tuple[int, str]]:
    """Return the stages and offloads that train a run file."""
    of_dtype = STAGES[1:] if run.deepspeed.dtype == "fp16" else STAGES
    return [found for found in of_dtype if found[1] == "none" or run.deepspeed.optimizer.type != "Muon"]


def micro_batches(run: RunConfig, ranks: int) -> list[int]:
    """Return the micro-batches that divide one rank's part of the global batch. Raises UserError as batch_plan does."""
    share = run.deepspeed.train_batch_size // batch_plan(run.deepspeed, ranks).replicas
    return [n for n in range(1, share + 1) if share % n == 0]


def changes(run: RunConfig, stage: int, offload: str, policy: str, micro_batch: int) -> list[str]:
    """Return the overrides (`key.path=value`) that give the run this setting."""
    optimizer, param = WHERE[offload]
    zero, ds = run.deepspeed.zero_optimization, run.deepspeed
    keys = [f"zero_optimization.stage={stage}"]
    for name, device, now in (
        ("offload_optimizer", optimizer, zero.offload_optimizer.device),
        ("offload_param", param, zero.offload_param.device),
    ):
        keys += [f"zero_optimization.{name}.device={device}"] if device != now else []
    keys.append(f"train_micro_batch_size_per_gpu={micro_batch}")
    keys += ["gradient_accumulation_steps=null"] if ds.gradient_accumulation_steps is not None else []
    if policy != run.megagpt.recompute.policy:
        keys.append(f'megagpt.recompute={{"policy": "{policy}"}}')
        keys += ["activation_checkpointing={}"] if "activation_checkpointing" in run.deepspeed.model_fields_set else []
    return keys


def fastest(found: Sequence[Setting]) -> Setting | None:
    """Return the fastest setting that fits, or None.

    Among times within 2 %, which this model cannot tell apart, it is the lowest stage with the largest micro-batch.
    """
    fitting = [s for s in found if s.fits]
    if not fitting:
        return None
    limit = min(s.seconds for s in fitting) * 1.02
    return min((s for s in fitting if s.seconds <= limit), key=lambda s: (s.stage, s.offload != "none", -s.micro_batch))


def _compute_seconds(run: RunConfig, batch: BatchPlan, vocab_size: int, on: Machine) -> float:
    """Return the seconds of a step's FLOPs, recomputation included, at the rate that all GPUs reach together."""
    cfg = run.megagpt
    model = cfg.model.model_copy(update={"seq_len": cfg.seq_len})
    again = recompute_flops_per_token(
        model,
        cfg.recompute,
        dropout=cfg.regularization.dropouts,
        zero3=run.deepspeed.zero_optimization.stage == 3,
        compiled=cfg.compile is not False,
    )
    flops = batch.global_batch * cfg.seq_len * (flops_per_token(model, vocab_size) + (again or 0.0))
    if run.deepspeed.optimizer.type == "Muon":  # once, or at stage 0 on every rank
        flops += muon_flops(model) * (on.ranks if run.deepspeed.zero_optimization.stage == 0 else 1)
    peak = on.gpu.peak_flops * (on.gpu.fp32_share if run.deepspeed.dtype == "fp32" else 1.0)
    return flops / (on.ranks * peak * on.efficiency)


def muon_flops(cfg: ModelConfig) -> int:
    """Return the FLOPs of one orthogonalization of all matrices in the blocks, in rounds of three products each."""
    sides = [sorted(shape) for shape in hidden_matrices(cfg)]
    return ROUNDS_OF_MUON * cfg.n_layer * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)


def _hidden_seconds(run: RunConfig, batch: BatchPlan, sent: Traffic, compute: float, bandwidth: float) -> float:
    """Return the seconds of communication that overlap_comm hides behind the compute.

    At stage 3, where it is on by default, gathering and scattering overlap with all of the compute. At stages 1 and 2
    only reducing does, and only with the backward passes that reduce: at stage 1 that of the last micro-batch.
    """
    stage = run.deepspeed.zero_optimization.stage
    if not run.deepspeed.zero_optimization.overlaps:
        return 0.0
    if stage == 3:
        return min(replace(sent, all_to_all=0, orthogonalized=0.0).wire / bandwidth, compute)
    reduced = replace(sent, all_gather=0, all_to_all=0, orthogonalized=0.0).wire / bandwidth
    return min(reduced, BACKWARD_SHARE * compute / (batch.accumulation if stage == 1 else 1))


def _host_seconds(run: RunConfig, batch: BatchPlan, vocab_size: int, offload: str) -> float:
    """Return the seconds of offload: gradients move to the host, Adam runs there, weights move back."""
    if offload == "none":
        return 0.0
    part, s = n_params(run.megagpt.model, vocab_size) / batch.world_size, WIDTH[run.deepspeed.dtype]
    # With "all", weights move to the GPU for each forward and backward pass.
    reads = batch.accumulation * 2 if offload == "all" else 1
    # Adam reads and writes two moments and the master weights, and reads the gradient: 28 bytes per parameter.
    return part * (s * (batch.accumulation + reads) / HOST_LINK + (2 * ADAM + 4) / HOST_ADAM)
