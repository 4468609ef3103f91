"""Bytes that one rank gives to collectives in an optimizer step, as DeepSpeed 0.19.8 calls them, and what they cost.

N parameters, W ranks, P of them sharing a sample, s bytes of a number that is sent.
"""

from dataclasses import dataclass

from megagpt.config.batch import BatchPlan
from megagpt.config.run_file import RunConfig
from megagpt.model.flops import param_sizes

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors: of a gather what all ranks have after it, of a scatter what they had before it."""

    world_size: int
    all_reduce: int
    reduce_scatter: int
    all_gather: int
    all_to_all: int
    shared_by: int = 1  # ranks that take part in an all-to-all

    @property
    def wire(self) -> float:
        """Bytes that leave this rank. A ring sends each byte once around: (W - 1) / W of a tensor to gather or to
        scatter it, and twice that to reduce it everywhere, which is optimal (Patarasuk and Yuan 2009, Bandwidth optimal
        all-reduce algorithms for clusters of workstations, section 3; NVIDIA's nccl-tests, doc/PERFORMANCE.md).
        """
        W, P = self.world_size, self.shared_by
        ring = 2 * self.all_reduce + self.reduce_scatter + self.all_gather
        return ring * (W - 1) / W + self.all_to_all * (P - 1) / P


def traffic(run: RunConfig, batch: BatchPlan, vocab_size: int) -> Traffic:
    """Of one optimizer step once training is under way (in its first, stage 3 gathers more, to learn the order).

    Stage 0 reduces all gradients once in a step. Stages 1 and 2 do not scatter them: each bucket is reduced everywhere
    and every rank keeps its part (`stage_1_and_2.py: average_tensor`), at stage 1 once in a step and at stage 2 in
    every micro-batch; then the new weights are gathered. Stage 3 scatters gradients and gathers weights in every
    micro-batch, small weights (`persistent`) only after the step.
    """
    W, stage, P = batch.world_size, run.deepspeed.zero_optimization.stage, batch.sequence_parallel_size
    if W == 1:
        return Traffic(1, 0, 0, 0, 0)
    sizes = param_sizes(run.megagpt.model, vocab_size)
    N, s = sum(sizes), WIDTH[run.deepspeed.dtype]
    sent = WIDTH.get(str(run.deepspeed_raw.get("communication_data_type")).lower(), s)
    every, exchanged = batch.accumulation, _all_to_all(run, batch)
    if stage == 0:
        return Traffic(W, N * sent, 0, 0, exchanged, P)
    if stage < 3:
        return Traffic(W, N * sent * (every if stage == 2 else 1), 0, s * _flat(run, sizes, W), exchanged, P)
    padded = sum(-(-n // W) * W for n in sizes)
    small = sum(-(-n // W) * W for n in sizes if n <= persistence(run))
    again = regathered(run, padded - small) + _tied_again(run, sizes[0], padded - small)
    gathered = every * (padded - small + again) + small
    return Traffic(W, 0, every * padded * sent, s * gathered, exchanged, P)


def persistence(run: RunConfig) -> int:
    """Stage 3 keeps parameters of up to so many elements whole on every rank."""
    return int(zero_key(run, "param_persistence_threshold", 1e5))


def regathered(run: RunConfig, partitioned: int) -> int:
    """Elements that stage 3 lets go after the forward pass and gathers again: whose next use is too far away.

    Backward comes back to a block after twice what lies behind it, so it is the first blocks that are let go; but what
    the prefetch for backward came across while it was still whole is kept (`partitioned_param_coordinator.py:
    __params_to_release`). `max_live_parameters` limits the prefetch alone.
    """
    return max(0, partitioned - int(max(_reuse(run) // 2, _prefetch(run))))


def _tied_again(run: RunConfig, tied: int, partitioned: int) -> int:
    """The output matrix, which is the embeddings' too: let go between these two uses, all blocks apart, it is gathered
    once more in the forward and once more in the backward pass.
    """
    return 2 * tied if partitioned - tied > max(_reuse(run), _prefetch(run)) else 0


def _reuse(run: RunConfig) -> float:
    return zero_key(run, "max_reuse_distance", 1e9)


def _prefetch(run: RunConfig) -> float:
    return zero_key(run, "prefetch_bucket_size", 5e7)


def zero_key(run: RunConfig, name: str, default: float) -> float:
    """A number of the zero_optimization section, of which stage 3's may be written with a prefix."""
    section = run.deepspeed_raw.get("zero_optimization", {})
    return float(section.get(name, section.get(f"stage3_{name}", default)))


def _flat(run: RunConfig, sizes: list[int], world_size: int) -> int:
    """Elements of stage 1 and 2's flat buffers: one for what decays, one for what does not, each in equal parts of
    an even number (`nccl_start_alignment_factor`).
    """
    C, L = run.megagpt.model.n_embd, run.megagpt.model.n_layer
    vectors = 0 if run.megagpt.regularization.weight_decay_on == "all" else (13 * L + 2) * C
    even = 2 * world_size
    return sum(-(-n // even) * even for n in (sum(sizes) - vectors, vectors))


def _all_to_all(run: RunConfig, batch: BatchPlan) -> int:
    """DeepSpeed-Ulysses (Jacobs et al. 2023, section 3.1): of each block the queries, keys, values and the result, in
    the forward pass and in backward; what is computed again is exchanged again.
    """
    if batch.sequence_parallel_size == 1:
        return 0
    cfg = run.megagpt
    tokens = batch.micro_batch * cfg.seq_len // batch.sequence_parallel_size
    again = cfg.recompute.n_blocks(cfg.model.n_layer) if cfg.recompute.policy in ("full", "every_k") else 0
    passes = 2 * cfg.model.n_layer + again
    return batch.accumulation * passes * 4 * tokens * cfg.model.n_embd * WIDTH[run.deepspeed.dtype]
