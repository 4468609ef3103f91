"""Print what `megagpt plan` estimates: a table for people, JSON for programs."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig
from megagpt.planner.estimate import (
    CONTEXT,
    EFFICIENCY,
    FP32_PEAK,
    FRAGMENTATION,
    GIB,
    HOST_ADAM,
    HOST_LINK,
    POLICIES,
    STAGES,
    Machine,
    Setting,
    fastest,
)
from megagpt.planner.memory import PARTS

# Keys that change memory or traffic in ways that the arithmetic does not count; a name stands for all that begin so.
NOT_COUNTED = (
    "data_types",
    "torch_autocast",
    "bf16.bf16_",
    "fp16.fp16_",
    "zero_optimization.zero_",
    "zero_optimization.mics_",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.use_",
)

HEAD = (
    "stage",
    "recompute",
    "batch",
    *PARTS,
    "spare",
    "total",
    "host",
    "fits",
    "GB sent",
    "ms/step",
    "days",
    "most at",
)


def plan_report(run: RunConfig, on: Machine, vocab: tuple[int, str], found: Sequence[Setting], tokens: int) -> str:
    """Return the table: the run file's own setting (the first found), its alternatives, and the fastest that fits."""
    current, best, batch = found[0], fastest(found), run.deepspeed.train_batch_size
    steps = tokens / (batch * run.megagpt.seq_len)
    alike = [s for s in found[1:] if (s.micro_batch, s.policy) == (current.micro_batch, current.policy)]
    stages = [[s for s in (current, *alike) if (s.stage, s.offload) == where][:1] for where in STAGES]
    policies = [_largest(policy, current, found) for policy in dict.fromkeys((*POLICIES, current.policy))]
    lines = [
        f"{on.ranks} x {on.name} ({on.gpu.memory_gib} GiB), {on.network}: {on.gb_per_s:g} GB/s each way for each GPU",
        f"{tokens:,} tokens in {steps:,.0f} steps of {batch:,} samples of {run.megagpt.seq_len:,} tokens; vocabulary "
        f"{vocab[0]:,} ({vocab[1]}); {run.deepspeed.dtype}",
        "",
        "Each stage with the run file's micro-batch and recompute (*: as written), in GiB per GPU:",
        *_table(HEAD, [_cells(s, steps) for found_here in stages for s in found_here]),
        "",
        f"The largest micro-batch that fits at stage {current.stage}, by recompute:",
        *_table(HEAD, [_cells(s, steps) for s in policies if s is not None]),
        *(["  none"] if not any(policies) else []),
        "",
        *_verdict(best, current, steps),
        "",
        "Assumed:",
        *(f"  {line}" for line in assumptions(run, on)),
    ]
    return "\n".join(lines)


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
        f"compute: model and recomputed FLOPs at {on.efficiency:.0%} of the dense 16-bit peak, "
        f"{on.gpu.peak_flops / 1e12:,.0f} TFLOP/s, for every micro-batch (--efficiency; default {EFFICIENCY:.0%}, "
        "published for GPT-2 on Hopper: 33 to 52 %)",
        "network: a ring's bytes over the bandwidth, without latency or other traffic, added to the compute except "
        "for what overlap_comm hides: at stage 3 (on by default) all traffic, during the whole step; at stages 1 and "
        "2 the gradients, during backward (at stage 1 only the last micro-batch's)",
        f"spare: {FRAGMENTATION:.0%} of the tensors for the allocator's gaps, and {CONTEXT / GIB:.0f} GiB for CUDA and "
        "NCCL",
        "activations: those of uncompiled blocks; compiled blocks keep less",
        f"offload: {HOST_LINK / 1e9:.0f} GB/s to the host for each GPU, {HOST_ADAM / 1e9:.0f} GB/s of its memory for "
        "Adam",
        "not counted: Adam on the GPU, waiting for data, evaluating, saving, compiling in the first step, and the "
        "GPU's waits when DeepSpeed reads a value back: at stage 0 in 16 bit once per parameter in every step",
    ]
    if run.deepspeed.dtype == "fp32":
        lines.append(f"fp32: {FP32_PEAK:.4f} of the 16-bit peak")
    zero = run.deepspeed.zero_optimization
    if "nvme" in (zero.offload_optimizer.device, zero.offload_param.device):
        lines.append("nvme: counted as host memory, at its speed")
    if unknown := [key for key in leaves(run.deepspeed_raw) if key.startswith(NOT_COUNTED)]:
        lines.append(f"ignored by this plan, though they change training: {', '.join(unknown)}")
    return lines


def _cells(s: Setting, steps: float) -> tuple[str, ...]:
    sizes = [*(getattr(s.memory, part) for part in PARTS), s.spare, s.total, s.memory.host]
    return (
        f"{'*' if s.current else ' '} {s.stage}{'' if s.offload == 'none' else f', offload {s.offload}'}",
        s.policy,
        str(s.micro_batch),
        *(f"{size / GIB:.2f}" for size in sizes),
        "yes" if s.fits else "no",
        f"{s.traffic.wire / 1e9:.2f}",
        f"{1e3 * s.seconds:,.1f}",
        f"{s.seconds * steps / 86_400:,.2f}",
        s.memory.when,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns: the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in (head, *rows)
    ]


def _largest(policy: str, current: Setting, found: Sequence[Setting]) -> Setting | None:
    """Return the setting with the largest micro-batch that fits, at the current stage and with this policy."""
    where = (current.stage, current.offload, policy)
    like = [s for s in found if (s.stage, s.offload, s.policy) == where and s.fits]
    return max(like, key=lambda s: s.micro_batch, default=None)


def _verdict(best: Setting | None, current: Setting, steps: float) -> list[str]:
    if best is None:
        return ["Nothing fits: use more ranks, or GPUs with more memory."]
    fits = "fits" if current.fits else f"does not fit: {current.total / GIB:.2f} GiB, most at {current.memory.when}"
    return [
        f"The run file as written {fits}.",
        f"Fastest that fits: stage {best.stage}, {best.total / GIB:.2f} GiB (most at {best.memory.when}), "
        f"{1e3 * best.seconds:,.1f} ms/step, {best.seconds * steps / 86_400:,.2f} days:",
        f"  {shlex.join(best.keys)}",
    ]
