"""Estimate the memory and time of a run file, for `megagpt plan`: by arithmetic, before anything is started.

Memory is counted by memory.py, traffic by communication.py, a step's time by step_time.py, compute.py and network.py.
This module has the settings that are compared; report.py prints them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megagpt.config.batch import batch_plan
from megagpt.config.run_file import RunConfig
from megagpt.data.manifest import read_manifest
from megagpt.errors import UserError
from megagpt.planner.communication import Traffic, traffic
from megagpt.planner.gpu_specs import Gpu, gpu_of
from megagpt.planner.memory import Memory, memory
from megagpt.planner.network import Network, network_of
from megagpt.planner.step_time import StepTime, step_time
from megagpt.tokenizer.tokenizer import padded_vocab_size

GIB = 2**30
VOCABULARY = 50_257  # GPT-2's, where the data is not there to ask
# FLOP/s that training reaches on a CPU, as a share of a large product's.
CPU_EFFICIENCY = 0.4
# Gaps between the allocator's blocks, as a share of the tensors' bytes.
FRAGMENTATION = 0.1
# CUDA's context, kernels and NCCL's buffers.
CONTEXT = 1.0 * GIB
# What is offloaded -> the devices of offload_optimizer and offload_param.
WHERE = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}
STAGES = [(0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer")]
STAGES.append((3, "all"))
POLICIES = ("none", "selective", "full")
# The key that lets stages 1 and 2 reduce during backward, and how much faster a step must be for a plan to name it: it
# takes a second bucket.
OVERLAP, OVERLAP_PAYS = "zero_optimization.overlap_comm=true", 1.02
# Times that this model cannot tell apart.
EQUAL_TIME = 1.02


@dataclass(frozen=True)
class Machine:
    """The GPUs of the plan and the network between them."""

    name: str
    gpu: Gpu
    ranks: int
    network: Network
    efficiency: float | None = None  # FLOP/s that are reached, as a share of the peak; None: counted part by part


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
    time: StepTime
    fits: bool
    keys: tuple[str, ...] = field(default=(), compare=False)  # overrides that turn the run file into this setting

    @property
    def seconds(self) -> float:
        """Seconds of one optimizer step."""
        return self.time.total

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
    efficiency: float | None = None,
    *,
    gib: float | None = None,
    tflops: float | None = None,
    gpus_per_host: int | None = None,
) -> Machine:
    """Describe the machine that the command line names. Raises UserError for an unknown GPU or network.

    `network` is what planner/network.py takes.
    """
    name, specs = gpu_of(gpu, gib, tflops)
    return Machine(name, specs, ranks, network_of(network, ranks, specs.link_gb_s, gpus_per_host), efficiency)


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
    time = step_time(run, batch, vocab_size, sent, on.network, on.gpu, on.efficiency)
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
        time=time,
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
                yield _changed(run, on, vocab_size, changes(run, stage, offload, policy, micro_batch))


def _changed(run: RunConfig, on: Machine, vocab_size: int, keys: Sequence[str]) -> Setting:
    """Estimate the run with these overrides; at stages 1 and 2 with overlap_comm, if it is left open and that pays."""
    plain = replace(setting(run.changed(*keys), on, vocab_size), keys=tuple(keys))
    if plain.stage not in (1, 2) or on.ranks == 1 or run.deepspeed.zero_optimization.overlap_comm is not None:
        return plain
    overlapping = replace(setting(run.changed(*keys, OVERLAP), on, vocab_size), keys=(*keys, OVERLAP))
    pays = overlapping.seconds < plain.seconds / OVERLAP_PAYS
    return overlapping if pays and overlapping.fits >= plain.fits else plain


def _trained(run: RunConfig) -> list[tuple[int, str]]:
    """Return the stages and offloads that train a run file."""
    of_dtype = STAGES[1:] if run.deepspeed.dtype == "fp16" else STAGES
    return [found for found in of_dtype if found[1] == "none" or run.deepspeed.optimizer.type != "Muon"]


def micro_batches(run: RunConfig, ranks: int) -> list[int]:
    """Return the micro-batches that divide one rank's part of the global batch, and of the first one of a ramp.

    Raises UserError as batch_plan does.
    """
    smallest = run.megagpt.schedule.batches(run.deepspeed.train_batch_size).at(0)
    share = smallest // batch_plan(run.deepspeed, ranks).replicas
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

    Among times that this model cannot tell apart it is the lowest stage with the largest micro-batch.
    """
    fitting = [s for s in found if s.fits]
    if not fitting:
        return None
    limit = min(s.seconds for s in fitting) * EQUAL_TIME
    return min((s for s in fitting if s.seconds <= limit), key=lambda s: (s.stage, s.offload != "none", -s.micro_batch))
