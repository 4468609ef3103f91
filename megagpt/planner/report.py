"""Print what `megagpt plan` estimates: a table for people, JSON for programs."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig
from megagpt.model.flops import flops_per_token, n_params
from megagpt.planner.compute import MOVING, PRODUCTS, SMALLEST_COMPARED
from megagpt.planner.estimate import (
    CONTEXT,
    EQUAL_TIME,
    FRAGMENTATION,
    GIB,
    OVERLAP_PAYS,
    POLICIES,
    STAGES,
    Machine,
    Setting,
    fastest,
)
from megagpt.planner.step_time import (
    CONTENTION,
    GATHER_LOOP,
    HOST_ADAM,
    HOST_LINK,
    SCATTER_LOOP,
    SLICE_LOOP,
    TENSOR_LOOP,
)
from megagpt.terminal import counted, duration

# Keys that change memory or traffic in ways that the arithmetic does not count; a name stands for all that begin so.
NOT_COUNTED = (
    "data_types",
    "torch_autocast",
    "bf16.bf16_",
    "fp16.fp16_",
    "zero_optimization.zero_quantized_",
    "zero_optimization.mics_",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.use_",
)

WIDTH = 100  # characters of a line
NEAR = 1.1  # memory that is nearly the same

STAGE_HEAD = ("stage", "weights", "optimizer", "grads", "rest", "total", "host", "fits", "GB sent", "a step", "in all")
RECOMPUTE_HEAD = ("recompute", "batch", "activations", "total", "host", "GB sent", "a step", "in all", "most at")


def plan_report(
    run: RunConfig,
    on: Machine,
    vocab: tuple[int, str],
    found: Sequence[Setting],
    tokens: int,
    already: Sequence[str] = (),
) -> str:
    """Return the table: the run file's own setting (the first found), its alternatives, and the fastest that fits.

    `already` are the overrides that gave this run.
    """
    current, best, batch = found[0], fastest(found), run.deepspeed.train_batch_size
    cfg, seq_len = run.megagpt.model, run.megagpt.seq_len
    steps = tokens / (batch * seq_len)
    alike = [s for s in found if (s.micro_batch, s.policy) == (current.micro_batch, current.policy)]
    stages = [s for where in STAGES for s in [s for s in alike if (s.stage, s.offload) == where][:1]]
    policies = [_largest(policy, current, found) for policy in dict.fromkeys((*POLICIES, current.policy))]
    rows = _worth_it([s for s in policies if s is not None])
    lines = [
        f"{n_params(cfg, vocab[0]):,} parameters: {counted(cfg.n_layer, 'layer')}, width {cfg.n_embd:,}; "
        f"{run.deepspeed.dtype}; vocabulary {vocab[0]:,} ({vocab[1]})",
        f"{tokens:,} tokens in {counted(round(steps), 'step')} of {counted(batch, 'sample')} of {seq_len:,} tokens",
        f"{on.ranks} x {on.name} ({on.gpu.memory_gib:g} GiB, {on.gpu.peak_flops / 1e12:,.0f} TFLOP/s), {on.network}",
        f"As written: {_speed(run, on, vocab[0], current)}{_does_not_fit(on, current)}",
        *([f"{on.name} has no bf16: planned in fp16, with {shlex.join(already)}"] if already else []),
        "",
        f"Stages with micro-batch {current.micro_batch} and recompute {current.policy!r} (*: as written), in GiB per "
        "GPU; rest: activations, buffers, spare. Stages of nearly the same memory that are no faster are left out:",
        *_table(STAGE_HEAD, [_stage_cells(s, steps) for s in _worth_it(stages)]),
        "",
        f"The largest micro-batch that fits at stage {current.stage}, by recompute:",
        *(_table(RECOMPUTE_HEAD, [_recompute_cells(s, steps) for s in rows]) if rows else ["  none"]),
        "",
        *_verdict(best, current, steps, already),
        "",
        "Assumed:",
        *(f"  {line}" for line in assumptions(run, on)),
    ]
    return "\n".join(wrapped for line in lines for wrapped in _wrapped(line))


def _worth_it(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings without those that need nearly as much memory as another that is no slower."""
    kept = [s for s in settings if s.current]
    for s in settings:
        if not any(other.fits >= s.fits and _no_worse(other, s) for other in kept):
            kept.append(s)
    return [s for s in settings if s in kept]


def _no_worse(one: Setting, other: Setting) -> bool:
    return 1 / NEAR <= one.total / other.total <= NEAR and one.seconds <= EQUAL_TIME * other.seconds


def as_json(on: Machine, vocab: tuple[int, str], found: Sequence[Setting], tokens: int) -> dict[str, Any]:
    """Return every setting that was tried, in bytes, seconds and FLOP/s."""

    def row(s: Setting) -> dict[str, Any]:
        return {**asdict(s), "seconds": s.seconds, "total": s.total, "wire": s.traffic.wire}

    best = fastest(found)
    return {
        "machine": asdict(on),
        "vocab_size": vocab[0],
        "tokens": tokens,
        "fastest": None if best is None else row(best),
        "settings": [row(s) for s in found],
    }


def assumptions(run: RunConfig, on: Machine) -> list[str]:
    """Return the plan's assumptions, one a line."""
    lines = [
        "a GPU: for a CPU, give --probe, which takes real steps, or let `megagpt init DATA --cpu` choose",
        _compute_assumed(on),
        "network: bytes over the speed of NCCL's rings, which use all cards of a host, and the hops of each call, "
        "without other traffic; added to the compute except for what overlap_comm hides: at stage 3 (on by default) "
        "all traffic, during the whole step; at stages 1 and 2 the gradients, during backward (at stage 1 only that of "
        f"the last micro-batch); meanwhile the compute is {CONTENTION:.0%} slower. Other settings than the run file's "
        f"have it where it makes a step {OVERLAP_PAYS - 1:.0%} faster and the run file leaves it out",
        f"DeepSpeed's host: at stage 3 {GATHER_LOOP * 1e6:g} us of Python for each tensor and rank in a gather and "
        f"{SCATTER_LOOP * 1e6:g} in a reduce-scatter; at stages 1 and 2 {TENSOR_LOOP * 1e6:g} us for each tensor and "
        f"{SLICE_LOOP * 1e6:g} for each rank in a pass that reduces; a step takes at least as long",
        f"spare: {FRAGMENTATION:.0%} of the tensors for the allocator's gaps, and {CONTEXT / GIB:.0f} GiB for CUDA and "
        "NCCL",
        "activations: those of uncompiled blocks; compiled blocks keep less",
        f"offload: {HOST_LINK / 1e9:.0f} GB/s to the host for each GPU, {HOST_ADAM / 1e9:.0f} GB/s of its memory for "
        "Adam",
        "not counted: launching kernels, which takes most of a small model's step, waiting for data, evaluating, "
        "saving, compiling in the first step, and the GPU's waits when DeepSpeed reads a value back: at stage 0 in 16 "
        "bit once per parameter in every step",
    ]
    if run.megagpt.recompute.policy == "budget":
        lines.append(
            "recompute budget: its memory is counted, its time is not, because the compiler chooses what to recompute"
        )
    if run.deepspeed.dtype == "fp32":
        lines.append(f"fp32: {on.gpu.fp32_share:.4f} of the 16-bit peak")
    zero = run.deepspeed.zero_optimization
    if "nvme" in (zero.offload_optimizer.device, zero.offload_param.device):
        lines.append("nvme: counted as host memory, at its speed")
    if unknown := [key for key in leaves(run.deepspeed_raw) if key.startswith(NOT_COUNTED)]:
        lines.append(f"ignored by this plan, though they change training: {', '.join(unknown)}")
    return lines


def _speed(run: RunConfig, on: Machine, vocab_size: int, current: Setting) -> str:
    """Say how fast a setting is in the numbers of a run's log."""
    tokens = run.deepspeed.train_batch_size * run.megagpt.seq_len / current.seconds / on.ranks
    model = run.megagpt.model.model_copy(update={"seq_len": run.megagpt.seq_len})
    mfu = tokens * flops_per_token(model, vocab_size) / on.gpu.peak_flops
    speed = f"{duration(current.seconds)} a step, {tokens:,.0f} tokens a second for each GPU, mfu {mfu:.1%}"
    note = launching(on, n_params(model, vocab_size))
    return f"{speed}; {note}" if note else speed


def launching(on: Machine, params: int) -> str:
    """Say that a model is so small that its step is mostly what the plan leaves out; "" if it is not."""
    if on.efficiency is not None or params >= SMALLEST_COMPARED:  # a measured efficiency has all in it
        return ""
    return "launching kernels, not counted, can take most of so small a model's step"


def _does_not_fit(on: Machine, current: Setting) -> str:
    return "" if current.fits else f"; does not fit: {_gib(current.total)} of {on.gpu.memory_gib:g} GiB"


def _compute_assumed(on: Machine) -> str:
    peak = f"{on.gpu.peak_flops / 1e12:,.0f} TFLOP/s"
    if on.efficiency is not None:
        return f"compute: model and recomputed FLOPs at {on.efficiency:.0%} of the peak, {peak} (--efficiency)"
    gpu = on.gpu
    return (
        f"compute: matrix products at {gpu.best_product * PRODUCTS:.0%} of the peak, {peak}, attention at "
        f"{gpu.attention:.0%}, and the bytes of everything else at {MOVING:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s"
        f"{' (usual for this peak)' if gpu.memory_gb_s is None else ''}; "
        "20 of 22 published runs with kernels like ours, on A100, H100, H200 and B200, were within 20 % of it; no "
        "other GPU was compared (docs/train.md). If you have measured a step, give the log's hfu as --efficiency"
    )


def _stage_cells(s: Setting, steps: float) -> tuple[str, ...]:
    states = [s.memory.weights, s.memory.optimizer, s.memory.gradients]
    where = {"none": "", "optimizer": ", Adam on host", "all": ", all on host"}[s.offload]
    return (
        f"{'*' if s.current else ' '} {s.stage}{where}",
        *map(_gib, [*states, s.total - sum(states), s.total, s.memory.host]),
        "yes" if s.fits else "no",
        f"{s.traffic.wire / 1e9:.2f}",
        duration(s.seconds),
        duration(s.seconds * steps),
    )


def _recompute_cells(s: Setting, steps: float) -> tuple[str, ...]:
    return (
        f"{'*' if s.current else ' '} {s.policy}",
        str(s.micro_batch),
        *map(_gib, [s.memory.activations + s.memory.logits, s.total, s.memory.host]),
        f"{s.traffic.wire / 1e9:.2f}",
        duration(s.seconds),
        duration(s.seconds * steps),
        s.memory.when,
    )


def _gib(n_bytes: float) -> str:
    gib = n_bytes / GIB
    return f"{gib:.2f}" if gib < 10 else f"{gib:,.1f}"


def _wrapped(line: str) -> list[str]:
    """Break a line of prose that is too long; one of a table or a command is not."""
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, WIDTH, subsequent_indent=f"{indent}  ", break_on_hyphens=False, break_long_words=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)) for row in (head, *rows)]


def _largest(policy: str, current: Setting, found: Sequence[Setting]) -> Setting | None:
    """Return the setting with the largest micro-batch that fits, at the current stage and with this policy."""
    where = (current.stage, current.offload, policy)
    like = [s for s in found if (s.stage, s.offload, s.policy) == where and s.fits]
    return max(like, key=lambda s: s.micro_batch, default=None)


def _verdict(best: Setting | None, current: Setting, steps: float, already: Sequence[str]) -> list[str]:
    if best is None:
        return ["Nothing fits: use more ranks, or GPUs with more memory."]
    fits = "fits" if current.fits else f"does not fit: {_gib(current.total)} GiB, most at {current.memory.when}"
    if not (words := [*already, *best.keys]):
        return [f"The run file as written {fits}, and nothing that fits is faster."]
    return [
        f"The run file as written {fits}.",
        f"Fastest that fits: stage {best.stage}, {_gib(best.total)} GiB (most at {best.memory.when}), "
        f"{duration(best.seconds)} a step, {duration(best.seconds * steps)} in all:",
        *_command(words),
    ]


def _command(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, over several lines of a shell where one would be too long."""
    line = f"  {shlex.join(words)}"
    return [line] if len(line) <= WIDTH else " \\\n".join(f"  {shlex.quote(word)}" for word in words).split("\n")
