"""The bytes that one rank hands to collectives in an optimizer step, as DeepSpeed 0.19.8 calls them.

N parameters, W ranks, P of them sharing a sample (sequence parallelism), s bytes per number that is sent, C the model's
width, L its number of blocks. tests/planner/test_estimate.py counts the bytes of real ranks.
"""

from dataclasses import dataclass

from megagpt.config.batch import BatchPlan
from megagpt.config.deepspeed import ZeroConfig
from megagpt.config.run_file import RunConfig
from megagpt.model.flops import bucket_elements, hidden_matrices, n_hidden, n_vector_elements, param_sizes

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
# Elements that DeepSpeed reduces at once without ZeRO (engine.py: MEMORY_OPT_ALLREDUCE_SIZE).
STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Calls:
    """Counts of the collectives that DeepSpeed calls, if it fills its buckets."""

    all_reduce: int = 0
    ring: int = 0  # all-gathers and reduce-scatters
    secondary: int = 0  # all-gathers from the secondary partition of hpZ


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors: after a gather, before a scatter, on either side of the others."""

    world_size: int
    all_reduce: int
    reduce_scatter: int
    all_gather: int
    all_to_all: int
    shared_by: int = 1  # ranks that take part in an all-to-all
    orthogonalized: float = 0.0  # by Muon, in an all-to-all of all ranks
    regathered: int = 0  # from the secondary partition of hpZ
    secondary: int = 1  # ranks that such a partition is on
    calls: Calls = Calls()

    @property
    def ring(self) -> float:
        """Bytes that leave this rank in rings over all ranks."""
        return (2 * self.all_reduce + self.reduce_scatter + self.all_gather) * (self.world_size - 1) / self.world_size

    @property
    def wire(self) -> float:
        """Bytes that leave this rank.

        A ring sends each byte once around: (W - 1) / W of a tensor to gather or to scatter it, and twice that to reduce
        it everywhere, which is optimal (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters
        of workstations, section 3; NVIDIA's nccl-tests, doc/PERFORMANCE.md).
        """
        W, P, Z = self.world_size, self.shared_by, self.secondary
        exchanged = self.orthogonalized * (W - 1) / W + self.all_to_all * (P - 1) / P
        return self.ring + exchanged + self.regathered * (Z - 1) / Z


def traffic(run: RunConfig, batch: BatchPlan, vocab_size: int) -> Traffic:
    """Return the traffic of one optimizer step, from the second step on.

    In the first step ZeRO stage 3 gathers more than this, while it learns in which order parameters are used.

    Stage 0 reduces all gradients once in a step. Stages 1 and 2 do not scatter them: each bucket is reduced everywhere
    and every rank keeps its part (`stage_1_and_2.py: average_tensor`), at stage 1 once in a step and at stage 2 in
    every micro-batch; then the new weights are gathered. Stage 3 scatters gradients and gathers weights in every
    micro-batch, but gathers small weights (`param_persistence_threshold`) only after the step.
    """
    zero, W, P = run.deepspeed.zero_optimization, batch.world_size, batch.sequence_parallel_size
    if W == 1:
        return Traffic(1, 0, 0, 0, 0)
    sizes = param_sizes(run.megagpt.model, vocab_size)
    N, s = sum(sizes), WIDTH[run.deepspeed.dtype]
    reduced_in = WIDTH.get(str(run.deepspeed.communication_data_type).lower(), s)
    micro_batches, exchanged, by_muon = batch.accumulation, _all_to_all(run, batch), _orthogonalized(run, W)
    if zero.stage == 0:
        return Traffic(W, N * reduced_in, 0, 0, exchanged, P, calls=Calls(all_reduce=-(-N // STAGE_0_BUCKET)))
    bucket = zero.reduce_bucket_size or bucket_elements(run.megagpt.model, vocab_size, W)
    if zero.stage < 3:
        times = micro_batches if zero.stage == 2 else 1
        flat = _flat(run, vocab_size, N, W)
        calls = Calls(all_reduce=times * -(-N // bucket), ring=len(flat))
        return Traffic(W, N * reduced_in * times, 0, s * sum(flat), exchanged, P, by_muon, calls=calls)
    # Stage 3 pads each parameter to a multiple of the ranks.
    padded = sum(-(-n // W) * W for n in sizes)
    small = sum(-(-n // W) * W for n in sizes if n <= zero.param_persistence_threshold)
    tied = sizes[0] if run.megagpt.model.tied else 0
    again = regathered(zero, padded - small) + _tied_again(zero, tied, padded - small)
    gathered, Z = micro_batches * (padded - small + again) + small, zero.secondary_ranks(W)
    # hpZ: the first gather of a step leaves a copy of each weight on Z ranks, from which all others are.
    inside = gathered - padded if Z > 1 else 0
    fetched = max(1, zero.prefetch_bucket_size)
    calls = Calls(
        ring=-(-(gathered - inside) // fetched) + micro_batches * -(-padded // bucket), secondary=-(-inside // fetched)
    )
    reduced = micro_batches * padded * reduced_in
    return Traffic(W, 0, reduced, s * (gathered - inside), exchanged, P, by_muon, s * inside, Z, calls)


def regathered(zero: ZeroConfig, partitioned: int) -> int:
    """Elements that stage 3 releases after the forward pass and gathers again, because their next use is too far away.

    Backward reaches a block again after twice the parameters between it and the model's end, so it is the first blocks
    that are released; but what the prefetch for backward finds while it is still whole is kept
    (`partitioned_param_coordinator.py: __params_to_release`). `max_live_parameters` limits the prefetch alone.
    """
    return max(0, partitioned - max(zero.max_reuse_distance // 2, zero.prefetch_bucket_size))


def _tied_again(zero: ZeroConfig, tied: int, partitioned: int) -> int:
    """Elements of the embedding matrix, which is the output matrix too, that are gathered again between these two uses.

    All blocks lie between the two. If the matrix is released there, it is gathered once more in the forward and once
    more in the backward pass.
    """
    return 2 * tied if partitioned - tied > max(zero.max_reuse_distance, zero.prefetch_bucket_size) else 0


def _flat(run: RunConfig, vocab_size: int, N: int, world_size: int) -> list[int]:
    """Elements of the flat buffers of stages 1 and 2: for parameters that decay, for those that do not, and for Muon's.

    Each is padded to equal parts of an even number of elements (`nccl_start_alignment_factor`), and gathered at once.
    """
    all_decay = run.megagpt.regularization.weight_decay_on == "all"
    vectors = 0 if all_decay else n_vector_elements(run.megagpt.model, vocab_size)
    even = 2 * world_size
    by_muon = n_hidden(run.megagpt.model) if run.deepspeed.optimizer.type == "Muon" else 0
    return [-(-n // even) * even for n in (N - vectors - by_muon, vectors, by_muon) if n]


def _orthogonalized(run: RunConfig, world_size: int) -> float:
    """Bytes of matrices that Muon sends in an update, there and back, in bf16 as on GPUs.

    Stage 3 has a part of every matrix on every rank. At stages 1 and 2 a rank's part is consecutive, so that only its
    first and its last matrix lie on other ranks too: counted as one whole.
    """
    cfg = run.megagpt.model
    if run.deepspeed.optimizer.type != "Muon" or world_size == 1 or run.deepspeed.zero_optimization.stage == 0:
        return 0.0
    part = n_hidden(cfg) / world_size
    largest = max(rows * columns for rows, columns in hidden_matrices(cfg))
    return 2 * WIDTH["bf16"] * (part if run.deepspeed.zero_optimization.stage == 3 else min(part, largest))


def _all_to_all(run: RunConfig, batch: BatchPlan) -> int:
    """Return the bytes that DeepSpeed-Ulysses exchanges for sequence parallelism (Jacobs et al. 2023, section 3.1).

    In each block the queries, keys, values and the result, in forward and in backward; what is recomputed is exchanged
    again.
    """
    if batch.sequence_parallel_size == 1:
        return 0
    cfg = run.megagpt
    tokens = batch.micro_batch * cfg.seq_len // batch.sequence_parallel_size
    again = cfg.recompute.n_blocks(cfg.model.n_layer) if cfg.recompute.policy in ("full", "every_k") else 0
    passes = 2 * cfg.model.n_layer + again
    return batch.accumulation * passes * 4 * tokens * cfg.model.n_embd * WIDTH[run.deepspeed.dtype]
