"""The time of an optimizer step: the GPU's compute, collectives, offload, and DeepSpeed's loops on the host.

W ranks, L blocks; each constant below has a physical meaning, and none is chosen for one run.
"""

from dataclasses import dataclass, replace

from megagpt.config.batch import BatchPlan
from megagpt.config.run_file import RunConfig
from megagpt.model.flops import n_params, param_sizes
from megagpt.planner.communication import WIDTH, Calls, Traffic
from megagpt.planner.compute import compute_seconds
from megagpt.planner.gpu_specs import Gpu
from megagpt.planner.memory import ADAM
from megagpt.planner.network import Network

# The backward pass's share of a step's FLOPs, without recomputation.
BACKWARD_SHARE = 2 / 3
# Compute slows down by this share while collectives run on the same GPU: 18.9 % on average of GPT and Llama on A100,
# H100, MI210 and MI250 (2025, "Characterizing Compute-Communication Overlap in GPU-Accelerated Distributed Deep
# Learning", arXiv 2507.03114).
CONTENTION = 0.189
# Bytes/s between a GPU and its host, each way: PCI Express 4, 16 lanes, of which 80 % are reached.
HOST_LINK = 25e9
# Bytes/s of host memory for each GPU's share of an offloaded Adam, which reads and writes 28 bytes per parameter.
HOST_ADAM = 10e9
# Seconds of ZeRO-3's loops in Python, for each tensor and rank: of a gather (partition_parameters.py:
# AllGatherCoalescedHandle.wait) and of a reduce-scatter (coalesced_collectives.py). tests/scale/zero3_loops.py measures
# them on a processor of its own.
GATHER_LOOP, SCATTER_LOOP = 2.3e-6, 2.2e-6
# The same for stages 1 and 2: in each pass that reduces, for each tensor, and for each of the slices that ranks keep
# (stage_1_and_2.py: average_tensor). tests/scale/zero12_loops.py measures them.
TENSOR_LOOP, SLICE_LOOP = 30e-6, 4.6e-6


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    wire: float
    hidden: float  # the part of `wire` that the compute hides
    offload: float
    loops: float  # DeepSpeed's on the host, which runs ahead of the GPU

    @property
    def total(self) -> float:
        """Seconds of the step: of the GPU, or of the host if it cannot keep ahead."""
        return max(self.compute + self.wire - self.hidden + self.offload, self.loops)


def step_time(
    run: RunConfig,
    batch: BatchPlan,
    vocab_size: int,
    sent: Traffic,
    network: Network,
    gpu: Gpu,
    efficiency: float | None,
) -> StepTime:
    """Estimate the seconds of a step of the run as it is written."""
    compute = compute_seconds(run, batch, vocab_size, gpu, efficiency)
    return StepTime(
        compute=compute,
        wire=_wire_seconds(sent, network),
        hidden=_hidden_seconds(run, batch, sent, compute, network),
        offload=_offload_seconds(run, batch, vocab_size),
        loops=_loop_seconds(run, batch, vocab_size, sent),
    )


def _wire_seconds(sent: Traffic, network: Network) -> float:
    """Return the seconds of all collectives one after the other: their bytes, and the hops that each begins with."""
    if sent.world_size == 1:
        return 0.0
    calls, W, P, Z = sent.calls, sent.world_size, sent.shared_by, sent.secondary
    bytes_of_all = sent.ring / network.ring
    bytes_of_all += sent.orthogonalized * (W - 1) / W / network.exchange(W)
    bytes_of_all += sent.all_to_all * (P - 1) / P / network.exchange(P)
    inside = network.link_gb_s * 1e9 if network.ranks_per_host >= Z else network.ring
    bytes_of_all += sent.regathered * (Z - 1) / Z / inside
    hops = calls.all_reduce * network.tree_latency + calls.ring * network.ring_latency(W)
    return bytes_of_all + hops + calls.secondary * network.ring_latency(Z)


def _hidden_seconds(run: RunConfig, batch: BatchPlan, sent: Traffic, compute: float, network: Network) -> float:
    """Return the seconds of communication that overlap_comm hides behind the compute, which is slower meanwhile.

    At stage 3, where it is on by default, gathering and scattering overlap with all of the compute. At stages 1 and 2
    only reducing does, and only with the backward passes that reduce: at stage 1 that of the last micro-batch. There a
    bucket is sent while backward fills the next one, so that nothing hides the last (average_tensor waits for the one
    before).
    """
    stage = run.deepspeed.zero_optimization.stage
    if sent.world_size == 1 or not run.deepspeed.zero_optimization.overlaps:
        return 0.0
    if stage == 3:
        during = min(_wire_seconds(replace(sent, all_to_all=0, orthogonalized=0.0), network), compute)
        return (1 - CONTENTION) * during
    calls = Calls(all_reduce=sent.calls.all_reduce)
    reduced = _wire_seconds(replace(sent, all_gather=0, all_to_all=0, orthogonalized=0.0, calls=calls), network)
    passes = _reducing_passes(stage, batch)
    hidden = reduced * (1 - passes / calls.all_reduce)
    return (1 - CONTENTION) * min(hidden, BACKWARD_SHARE * compute * passes / batch.accumulation)


def _reducing_passes(stage: int, batch: BatchPlan) -> int:
    """Return how many backward passes of a step reduce gradients."""
    return batch.accumulation if stage >= 2 else 1


def _offload_seconds(run: RunConfig, batch: BatchPlan, vocab_size: int) -> float:
    """Return the seconds of offload: gradients move to the host, Adam runs there, weights move back."""
    zero = run.deepspeed.zero_optimization
    moves_weights = zero.offload_param.device != "none"
    if not moves_weights and zero.offload_optimizer.device == "none":
        return 0.0
    part, s = n_params(run.megagpt.model, vocab_size) / batch.world_size, WIDTH[run.deepspeed.dtype]
    # Offloaded weights move to the GPU for each forward and backward pass.
    reads = batch.accumulation * 2 if moves_weights else 1
    # Adam reads and writes two moments and the master weights, and reads the gradient: 28 bytes per parameter.
    return part * (s * (batch.accumulation + reads) / HOST_LINK + (2 * ADAM + 4) / HOST_ADAM)


def _loop_seconds(run: RunConfig, batch: BatchPlan, vocab_size: int, sent: Traffic) -> float:
    """Return the seconds of ZeRO's loops over tensors and ranks.

    At stage 3 a rank's Python begins a gather or a reduce-scatter with slices of each tensor for each rank, in every
    micro-batch; at stages 1 and 2 it cuts all gradients together into a slice for each rank.
    """
    zero, W = run.deepspeed.zero_optimization, batch.world_size
    if zero.stage == 0 or W == 1:
        return 0.0
    sizes = param_sizes(run.megagpt.model, vocab_size)
    if zero.stage < 3:
        return _reducing_passes(zero.stage, batch) * (TENSOR_LOOP * len(sizes) + SLICE_LOOP * W)
    large = [n for n in sizes if n > zero.param_persistence_threshold]
    s, whole = WIDTH[run.deepspeed.dtype], max(1, sum(large))
    # A tensor is gathered as often as its bytes are: the share of those that are gathered again counts.
    gathers = len(large) * (sent.all_gather * W + sent.regathered * sent.secondary) / (s * whole)
    return GATHER_LOOP * gathers + SCATTER_LOOP * batch.accumulation * len(sizes) * W
