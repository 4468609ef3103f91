"""Estimate the bytes of tensors that one rank holds at the worst moment of a training step, by their purpose.

The arithmetic is checked against the tensors that live on real ranks (tests/planner/test_estimate.py).

N parameters, W ranks, t tokens of a micro-batch on this rank, C width, H heads, T positions, V vocabulary, s bytes per
number that the model computes with. One unit U = t C s is a (B, T, C) tensor.
"""

from dataclasses import dataclass, fields, replace

from megagpt.config.batch import BatchPlan
from megagpt.config.deepspeed import ZeroConfig
from megagpt.config.run_file import RunConfig
from megagpt.data.packing import PACKING
from megagpt.model.flops import bucket_elements, n_hidden, param_sizes
from megagpt.model.loss import ROW_BLOCK_BYTES, chunks
from megagpt.planner.communication import WIDTH, regathered

# Bytes per parameter: two moments and the fp32 master weights, which ZeRO keeps in fp32 training too.
ADAM = 12
# Elements that stage 0 reduces at a time: MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine.py.
AT_ONCE = 500_000_000
# Elements that Muon orthogonalizes at a time: AT_ONCE of engine/muon.py.
AT_ONCE_BY_MUON = 2**25
# Units that a block keeps for backward, its result included: without recomputation, and with the policy "selective".
# tests/engine/test_build.py counts them.
WHOLE = 16
SELECTIVE = 9
# Units that a block's backward adds: gradients of (B, T, 4C) before and after GELU, less what it frees.
BACKWARD = 5


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose at one moment of a step; `host` is what offload moves to the CPU's memory."""

    weights: float
    optimizer: float
    gradients: float
    buffers: float  # tensors that are gathered, reduced or converted at that moment
    activations: float
    logits: float
    host: float
    when: str  # the moment

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return float(sum(getattr(self, part) for part in PARTS))


PARTS = tuple(field.name for field in fields(Memory) if field.name not in ("host", "when"))


@dataclass(frozen=True)
class _States:
    """Bytes that a ZeRO stage holds, independent of the micro-batch's size."""

    weights: float
    optimizer: float
    host: float
    held: float  # gradients accumulated before the last micro-batch
    gathered: float  # weights that stage 3 holds whole between a forward and a backward pass
    prefetched: float  # the flat tensors in which those were gathered
    bucket: float  # gradients that are being reduced
    reduced: float  # gradients at the end of backward
    copied: float  # copies of them that are made then
    converted: float  # their copies for Adam
    stepped: float  # gradients while Adam runs


def memory(run: RunConfig, batch: BatchPlan, vocab_size: int, *, on_cpu: bool = False) -> Memory:
    """Estimate the worst of four moments of a step's last micro-batch, from the second step on.

    In the first step Adam's moments do not exist yet.
    """
    states = _states(run, batch, vocab_size, on_cpu=on_cpu)
    kept, again, moved = _activations(run, batch)
    logits = _logits(run, batch, vocab_size, on_cpu=on_cpu)
    # The output matrix's gradient.
    head = vocab_size * run.megagpt.model.n_embd * WIDTH[run.deepspeed.dtype]
    whole = states.weights + states.gathered
    moments = {
        "loss": (whole, states.held, states.prefetched, kept, logits),
        "first backward": (whole, states.held + head, states.bucket, kept + again, 0.0),
        "last backward": (
            states.weights,
            states.reduced,
            max(states.copied, states.bucket + 2 * head),
            again,
            0.0,
        ),
        "update": (states.weights, states.stepped, states.converted, 0.0, 0.0),
    }
    found = [
        Memory(weights, states.optimizer, gradients, buffers, activations, scores, states.host + moved, when)
        for when, (weights, gradients, buffers, activations, scores) in moments.items()
    ]
    return max(found, key=lambda moment: moment.total)


def _states(run: RunConfig, batch: BatchPlan, vocab_size: int, *, on_cpu: bool) -> _States:
    """Count what one rank holds at the run's ZeRO stage (Rajbhandari et al. 2020, section 5)."""
    zero, sizes = run.deepspeed.zero_optimization, param_sizes(run.megagpt.model, vocab_size)
    N, W, s, accumulates = sum(sizes), batch.world_size, WIDTH[run.deepspeed.dtype], batch.accumulation > 1
    elements = zero.reduce_bucket_size or bucket_elements(run.megagpt.model, vocab_size, W)
    if zero.stage == 0:
        states = _replicated(N, W, s, accumulates=accumulates)
    elif zero.stage < 3:
        # With overlap, one bucket fills while the other is reduced.
        bucket = s * elements * (2 if zero.overlaps else 1)
        states = _sharded_optimizer(zero, N, W, s, bucket, accumulates=accumulates)
    else:
        states = _sharded_weights(zero, sizes, W, s, s * elements)
    if run.deepspeed.optimizer.type == "Muon":
        states = _with_muon(states, run, W, on_cpu=on_cpu)
    return states if run.megagpt.ema.decay is None else _with_averages(states, run, N if zero.stage == 0 else N / W)


def _with_averages(states: _States, run: RunConfig, n: float) -> _States:
    """Add the averages of n weights, in fp32 and where Adam's moments are."""
    if run.deepspeed.zero_optimization.offload_optimizer.device != "none":
        return replace(states, host=states.host + 4 * n)
    return replace(states, optimizer=states.optimizer + 4 * n)


def _with_muon(states: _States, run: RunConfig, W: int, *, on_cpu: bool) -> _States:
    """Replace Adam by Muon for the blocks' matrices: no second moment, and what orthogonalizing takes in each update.

    That is two copies of the matrices that are computed together, those of one shape, at most two thirds of all; and at
    stage 3 what is sent, what is received, and the whole matrices. Stages 1 and 2 free the gradients that they have
    converted before it (`stage_1_and_2.py: step`).
    """
    stage, n = run.deepspeed.zero_optimization.stage, n_hidden(run.megagpt.model)
    part, width = n if stage == 0 else n / W, 4 if on_cpu else 2
    exchanged = 3 * part if stage == 3 and W > 1 else 0.0
    freed = states.stepped * (1 if run.deepspeed.dtype == "fp32" else 2) if stage in (1, 2) else 0.0
    taken = width * (2 * min(2 / 3 * part, AT_ONCE_BY_MUON) + exchanged)
    return replace(states, optimizer=states.optimizer - 4 * part, converted=states.converted + max(0.0, taken - freed))


def _replicated(N: int, W: int, s: int, *, accumulates: bool) -> _States:
    """Stage 0: every rank holds all of everything."""
    mixed = s == 2
    return _States(
        weights=s * N,
        # In fp32 the weights are their own master weights.
        optimizer=ADAM * N if mixed else 8 * N,
        host=0.0,
        held=s * N if accumulates else 0.0,
        gathered=0.0,
        prefetched=0.0,
        bucket=0.0,
        reduced=s * N,
        copied=s * min(N, AT_ONCE) if W > 1 else 0.0,
        converted=4 * N if mixed else 0.0,
        stepped=s * N,
    )


def _sharded_optimizer(zero: ZeroConfig, N: int, W: int, s: int, bucket: float, *, accumulates: bool) -> _States:
    """Stages 1 and 2: every rank holds all weights and part of the optimizer state, at stage 2 also of gradients."""
    part = s * N / W
    on_gpu, on_host = _adam(zero, N / W)
    held = s * N if zero.stage == 1 else part
    return _States(
        weights=s * N,
        optimizer=on_gpu,
        host=on_host,
        held=held if accumulates else 0.0,
        gathered=0.0,
        prefetched=0.0,
        bucket=bucket if W > 1 else 0.0,
        reduced=part if zero.stage == 1 or not accumulates else 2 * part,
        copied=part + bucket,
        converted=0.0 if on_host else part + (4 * N / W if s == 2 else 0.0),
        stepped=0.0 if on_host else part,
    )


def _sharded_weights(zero: ZeroConfig, sizes: list[int], W: int, s: int, bucket: float) -> _States:
    """Stage 3: every rank holds its part of everything, and small parameters whole."""
    N = sum(sizes)
    part = s * N / W
    on_gpu, on_host = _adam(zero, N / W)
    offloaded = zero.offload_param.device != "none"
    small = sum(n for n in sizes if n <= zero.param_persistence_threshold)
    live = N - small - regathered(zero, N - small)
    # Adam converts one group of parameters at a time.
    group = min(N, zero.sub_group_size) / W
    secondary = s * (N - small) / zero.secondary_ranks(W) if zero.secondary_ranks(W) > 1 else 0.0
    return _States(
        weights=s * small + (0.0 if offloaded else part) + secondary,
        optimizer=on_gpu,
        host=on_host + (part if offloaded else 0.0),
        held=part + bucket,
        gathered=s * live,
        prefetched=s * min(live, zero.prefetch_bucket_size),
        bucket=0.0,
        reduced=part + bucket,
        copied=0.0,
        converted=0.0 if on_host else group * (s + (4 if s == 2 else 0)),
        stepped=part + bucket,
    )


def _adam(zero: ZeroConfig, n_params: float) -> tuple[float, float]:
    """Return the bytes of Adam's states on the GPU and on the host, where offloaded gradients lie too, in fp32."""
    return (ADAM * n_params, 0.0) if zero.offload_optimizer.device == "none" else (0.0, (ADAM + 4) * n_params)


def _activations(run: RunConfig, batch: BatchPlan) -> tuple[float, float, float]:
    """Return bytes of activations: (kept for backward, added by the last block's backward, moved to the host)."""
    cfg, s = run.megagpt, WIDTH[run.deepspeed.dtype]
    L, H, T = cfg.model.n_layer, cfg.model.n_head, cfg.seq_len
    tokens = batch.micro_batch * T / batch.sequence_parallel_size
    U = tokens * cfg.model.n_embd * s
    scores = tokens * H * T  # elements of all heads' attention weights
    # Attention's log-sum-exp, and the mean and deviation of two LayerNorms, in fp32.
    extra = 4 * tokens * (H + 4)
    if cfg.model.attention == "eager":
        # The softmax, queries and keys in fp32, the weights that multiply the values, and a byte each for a mask.
        extra += scores * (4 + (s if s == 2 else 0) + 1) + (2 * tokens * cfg.model.n_embd * 4 if s == 2 else 0)
    elif PACKING[cfg.packing.kind].masked:
        # The mask of each sample, (T, T), as numbers that are added to the scores.
        extra += batch.micro_batch * T * T * s
    else:  # that of a window, which is one for all samples
        extra += T * T * s * (1 - cfg.model.windows.count(None) / L)
    if cfg.regularization.dropouts.residual > 0.0:
        # The masks of two results, a byte for each number.
        extra += 2 * tokens * cfg.model.n_embd
    # What newer parts keep beyond GPT-2's: rotated queries and keys, those before their norms, a gate and its SiLU.
    copies = 2.0 * ((cfg.model.position == "rotary") + cfg.model.qk_norm)
    # What is mixed, where the mixture is kept already.
    values = cfg.model.kv_heads / H if cfg.model.value_residual else 0.0
    copies += values + (1 if cfg.model.embedding_shortcut else 0)
    mlp = (4 if cfg.model.gated else 2) * cfg.model.mlp_inner / cfg.model.n_embd - 8
    whole = (WHOLE + copies + mlp) * U + extra
    policy, again = cfg.recompute.policy, cfg.recompute.n_blocks(L)
    each = {"selective": SELECTIVE * U + 4 * tokens * H, "budget": U + (cfg.recompute.budget or 0.0) * (whole - U)}
    less = each.get(policy, U)  # kept of a block that is recomputed
    if policy == "budget":
        again = L
    blocks = again * less + (L - again) * whole
    ends = (2 + values) * U  # the embeddings' sum, the last LayerNorm's result, the first block's values
    # Backward begins with the last block, which is recomputed first if the policy includes it.
    backward = BACKWARD * U + (whole - less if again and (L - 1) % (cfg.recompute.k or 1) == 0 else 0.0)
    if cfg.recompute.offload or run.deepspeed.activation_checkpointing.cpu_checkpointing:
        return ends + whole, backward, blocks
    return ends + blocks, backward, 0.0


def _logits(run: RunConfig, batch: BatchPlan, vocab_size: int, *, on_cpu: bool) -> float:
    """Return the most bytes that the loss holds, which depends on the path that loss.py: next_token_score takes.

    Computed whole, it holds the logits' softmax and the gradients of both, in fp32. Computed in chunks, it holds one
    chunk's logits, their softmax and gradient; then that chunk's logits, their product, and the output matrix's
    gradient, in fp32 if there are several chunks.
    """
    cfg, s = run.megagpt, WIDTH[run.deepspeed.dtype]
    n_tokens = batch.micro_batch * cfg.seq_len // batch.sequence_parallel_size
    n_chunks = chunks(n_tokens, vocab_size)
    in_blocks = on_cpu and 4 * n_tokens * vocab_size > ROW_BLOCK_BYTES
    compiled = not on_cpu and cfg.compile is not False
    if n_chunks == 1 and not (in_blocks or compiled):
        scores = 4.0 * n_tokens * vocab_size
        return 3 * scores + (scores if cfg.regularization.z_loss > 0.0 else 0.0)
    chunk = -(-n_tokens // n_chunks) * vocab_size
    matrix = 0.0 if n_chunks == 1 else 4.0 * vocab_size * cfg.model.n_embd
    softmax = 2.0 * ROW_BLOCK_BYTES if in_blocks else chunk * (4.0 + s)
    return matrix + s * chunk + max(softmax, float(s * vocab_size * cfg.model.n_embd))
