"""The time that one GPU computes in an optimizer step, part by part: its products, its attention, what it moves.

A GPU is limited by its matrix units or by its memory, and a step alternates between the two (Williams et al. 2009,
Roofline). So the seconds of a step are those of the matrix products at the speed that products reach, those of
attention's kernel, and the bytes of everything else over the memory's bandwidth. Small models are slow because a
narrow matrix has many bytes for each FLOP, and fast GPUs are used less because their memory is not as much faster.

One unit U = C s is what a block's input has for each token: C width, s bytes per number. The constants are compared
with published runs in tests/programs/published.py.
"""

from dataclasses import dataclass

from megagpt.config.batch import BatchPlan
from megagpt.config.model import ModelConfig
from megagpt.config.run_file import RunConfig
from megagpt.data.packing import PACKING
from megagpt.model.flops import flops_per_token, hidden_matrices, n_params, recompute_flops_per_token
from megagpt.planner.communication import WIDTH
from megagpt.planner.gpu_specs import Gpu

ROUNDS_OF_MUON = 5  # ROUNDS of engine/muon.py
# Speed of a model's products as a share of the best product's (Gpu.best_product): some shapes leave units idle. Chosen
# by llm-foundry's runs on A100s of 80 GB. Attention's (gpu_specs.py) and SCORES follow from other training runs.
PRODUCTS = 0.88
# Parameters of the smallest model whose published runs were compared: GPT-2's.
SMALLEST_COMPARED = 124e6
# Causal kernels skip half of the scores, and the backward pass computes them again: 7 products instead of 6.
CAUSAL, SCORES_AGAIN = 1 / 2, 7 / 6
# Share of the memory's bandwidth that reading and writing large tensors reaches.
MOVING = 0.85
# Bytes moved by blocks that are not compiled, whose norms, residuals and biases are kernels of their own: 71 units of
# GPT-2's block against 53.
NOT_FUSED = 71 / 53
# Bytes moved for each logit: compiled, it is read twice and its gradient written; else it is converted to fp32, too.
LOSS, LOSS_NOT_FUSED = 8, 24
# Bytes moved for each of attention's scores where no kernel fuses them (attention "eager"). Fused attention took a
# compiled step of GPT-2 on an A100 from 130 to 96 ms (Karpathy 2024, "Let's reproduce GPT-2", chapters), which are 24
# bytes a score; not compiled, each of the softmax's steps reads and writes fp32.
SCORES, SCORES_NOT_FUSED = 24, 72
# Bytes moved for each parameter: by a micro-batch, in tensors of the weights' size, where they are read by two passes
# and their gradient is written, copied into a bucket and added up; and for each gather of stage 3, which is copied.
MICRO_BATCH, GATHER = 7, 2
# Bytes moved for each parameter of an update: Adam reads 16 and writes 12 in fp32; the gradient is converted (6), its
# norm taken (4), and the weight written in 16 bit (2).
UPDATE = 40


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and of attention, and other bytes moved."""

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return both together."""
        return Work(self.products + other.products, self.attention + other.attention, self.moved + other.moved)

    def times(self, n: float) -> "Work":
        """Return it n times."""
        return Work(n * self.products, n * self.attention, n * self.moved)

    def seconds(self, gpu: Gpu, peak: float) -> float:
        """Return the seconds that a GPU takes for it, at this peak of its matrix units."""
        products = self.products / (peak * gpu.best_product * PRODUCTS)
        return products + self.attention / (peak * gpu.attention) + self.moved / (gpu.bandwidth * MOVING)


def compute_seconds(run: RunConfig, batch: BatchPlan, vocab_size: int, gpu: Gpu, efficiency: float | None) -> float:
    """Return the seconds that each GPU computes in a step, recomputation and update included.

    With an efficiency, which somebody measured, they are all FLOPs at this share of the peak.
    """
    peak = gpu.peak_flops * (gpu.fp32_share if run.deepspeed.dtype == "fp32" else 1.0)
    done = work(run, batch, vocab_size)
    if efficiency is None:
        return done.seconds(gpu, peak)
    return counted_flops(run, batch, vocab_size) / (batch.world_size * peak * efficiency)


def counted_flops(run: RunConfig, batch: BatchPlan, vocab_size: int) -> float:
    """Return the FLOPs of a step over all ranks as `hfu` counts them, with Muon's."""
    each = flops_per_token(_model(run), vocab_size) + _again(run, _model(run))
    return batch.global_batch * run.megagpt.seq_len * each + batch.world_size * _muon(run, batch)


def work(run: RunConfig, batch: BatchPlan, vocab_size: int) -> Work:
    """Return what one rank does in a step."""
    tokens = batch.global_batch * run.megagpt.seq_len / batch.world_size
    per_token = _model_work(run, vocab_size)
    micro_batch = Work(moved=_moved_by_a_micro_batch(run, vocab_size))
    return per_token.times(tokens) + micro_batch.times(batch.accumulation) + _update(run, batch, vocab_size)


def _model(run: RunConfig) -> ModelConfig:
    return run.megagpt.model.model_copy(update={"seq_len": run.megagpt.seq_len})


def _model_work(run: RunConfig, vocab_size: int) -> Work:
    """Return the work for one token: forward, backward, recomputed."""
    # Masked, attention computes whole sequences, of which windows see a part.
    windows = _model(run).windows
    cfg = _model(run).model_copy(update={"sliding_window": None, "sliding_window_pattern": None})
    no_context = cfg.model_copy(update={"seq_len": 0})
    products, again = flops_per_token(no_context, vocab_size), _again(run, no_context)
    attention, attention_again = flops_per_token(cfg, vocab_size) - products, _again(run, cfg) - again
    s = WIDTH[run.deepspeed.dtype]
    blocks = run.megagpt.recompute.n_blocks(cfg.n_layer)
    in_products, forward, backward = _units(cfg)
    fused = run.megagpt.compile is not False
    others = cfg.n_layer * (forward + backward) + blocks * forward
    units = (3 * cfg.n_layer + blocks) * in_products + others * (1.0 if fused else NOT_FUSED)
    moved = units * cfg.n_embd * s
    # The head's product reads and writes three times, too.
    moved += 3 * (vocab_size + cfg.n_embd) * s + vocab_size * (LOSS if fused else LOSS_NOT_FUSED)
    if cfg.attention == "eager":
        moved += (SCORES if fused else SCORES_NOT_FUSED) * cfg.n_layer * cfg.n_head * cfg.seq_len
        return Work(products + again + attention + attention_again, 0.0, moved)
    masked = 1.0 if PACKING[run.megagpt.packing.kind].masked else 1 - windows.count(None) / cfg.n_layer
    share = masked + (1.0 - masked) * CAUSAL
    return Work(products + again, share * (SCORES_AGAIN * attention + attention_again), moved)


def _units(cfg: ModelConfig) -> tuple[float, float, float]:
    """Return the units that a compiled block moves for each token: in products forward, in all else forward, backward.

    Products read their input and write their output once forward, and twice backward, for both gradients.
    """
    qkv, inner = 1 + 2 * cfg.kv_heads / cfg.n_head, cfg.mlp_inner / cfg.n_embd
    into = inner * (2 if cfg.gated else 1)
    products = (1 + qkv) + (1 + 1) + (1 + into) + (inner + 1)
    # Two norms, each with the sum of residuals before it, and the second sum.
    norms = 8
    # Rotation and norms of queries and keys read and write both.
    heads = 4 if cfg.position == "rotary" or cfg.qk_norm else 0
    # A mixture reads two tensors and writes one.
    mixes = 3 * (cfg.embedding_shortcut + cfg.value_residual * cfg.kv_heads / cfg.n_head)
    forward = norms + heads + mixes + (qkv + 1) + (into + inner)
    biases = qkv + 2 if cfg.bias else 0
    backward = norms + heads + 2 * mixes + 2 * (qkv + 1) + (2 * into + inner) + biases
    return products, forward, backward


def _again(run: RunConfig, cfg: ModelConfig) -> float:
    """Return the FLOPs for each token that are recomputed; 0 where the compiler decides."""
    megagpt = run.megagpt
    again = recompute_flops_per_token(
        cfg,
        megagpt.recompute,
        dropout=megagpt.regularization.dropouts,
        zero3=run.deepspeed.zero_optimization.stage == 3,
        compiled=megagpt.compile is not False,
    )
    return again or 0.0


def _moved_by_a_micro_batch(run: RunConfig, vocab_size: int) -> float:
    n_bytes = n_params(run.megagpt.model, vocab_size) * WIDTH[run.deepspeed.dtype]
    recomputes = run.megagpt.recompute.n_blocks(run.megagpt.model.n_layer) > 0
    gathers = 2 if run.deepspeed.zero_optimization.stage == 3 else 0
    return n_bytes * (MICRO_BATCH + recomputes + GATHER * gathers)


def _update(run: RunConfig, batch: BatchPlan, vocab_size: int) -> Work:
    """Return the optimizer's work: on this rank's part of the parameters, or at stage 0 on all of them."""
    zero = run.deepspeed.zero_optimization
    if zero.offload_optimizer.device != "none":  # step_time.py has the host's
        return Work()
    part = n_params(run.megagpt.model, vocab_size) / (1 if zero.stage == 0 else batch.world_size)
    return Work(products=_muon(run, batch), moved=UPDATE * part)


def _muon(run: RunConfig, batch: BatchPlan) -> float:
    """Return the FLOPs of Muon on one rank; at stage 0 each orthogonalizes all matrices."""
    if run.deepspeed.optimizer.type != "Muon":
        return 0.0
    everywhere = run.deepspeed.zero_optimization.stage == 0
    return muon_flops(run.megagpt.model) / (1 if everywhere else batch.world_size)


def muon_flops(cfg: ModelConfig) -> int:
    """Return the FLOPs of one orthogonalization of all matrices in the blocks, in rounds of three products each."""
    sides = [sorted(shape) for shape in hidden_matrices(cfg)]
    return ROUNDS_OF_MUON * cfg.n_layer * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)
