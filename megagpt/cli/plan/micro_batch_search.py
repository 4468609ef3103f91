"""`megagpt plan RUN.json --probe`: find the largest micro-batch that fits, by taking real steps.

Each attempt starts new processes, so that running out of memory ends that attempt alone. This module is also the
program of one rank in an attempt. The samples are random tokens: no data is read, and nothing is written to out_dir.
"""

import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megagpt.cli.spawn_ranks import failure_of, on_ranks
from megagpt.config.batch import batch_plan
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.data.packing import PACKING
from megagpt.distributed.collectives import errors_on_every_rank, gather_objects
from megagpt.distributed.process_group import init_process_group, is_main, leave, world_size
from megagpt.engine.build import build_engine
from megagpt.engine.compilation import compiles
from megagpt.engine.precision import with_supported_dtype
from megagpt.guards.out_of_memory import is_out_of_memory, memory_of
from megagpt.model.loss import next_token_score
from megagpt.terminal import exit_code_of

# Exit codes of a rank that ran out of memory: its own, and SIGKILL by the kernel.
OUT_OF_MEMORY = 3
KILLED = -9


@dataclass(frozen=True)
class Used:
    """Bytes on the rank that used most: of the whole process on a CPU, reserved by the allocator on a GPU."""

    peak: int
    limit: int


def search(
    run_file: Path,
    overrides: Sequence[str],
    candidates: Sequence[int],
    vocab_size: int,
    *,
    ranks: int,
    gib: float | None,
) -> dict[int, Used | None]:
    """Try micro-batches of the rising candidates; return {micro_batch: memory used, or None if it did not fit}.

    `gib` limits each rank's memory; the default is the GPU's, or the rank's share of the machine's. Raises UserError
    if an attempt fails for another reason.
    """

    def attempt(micro_batch: int) -> Used | None:
        with TemporaryDirectory(prefix="probe_") as folder:
            out = Path(folder) / "used.json"
            given = [str(run_file), str(micro_batch), str(vocab_size), str(gib or 0.0), str(out), *overrides]
            # Compiled code goes to out_dir.
            done = on_ranks(ranks, __spec__.name, *given, f"megagpt.out_dir={folder}/run")
            if done.returncode == 0:
                return Used(**json.loads(out.read_text()))
            if done.returncode in (OUT_OF_MEMORY, KILLED):
                return None
            raise failure_of(done)

    return bisect(candidates, attempt)


def search_report(tries: dict[int, Used | None], run: RunConfig) -> str:
    """Describe the largest micro-batch that fits, the attempts, and the keys to set."""
    used = {n: one for n, one in tries.items() if one is not None}
    tried = [f"{n}: " + (f"{used[n].peak / 2**30:.2f} GiB" if n in used else "out of memory") for n in sorted(tries)]
    if not used:
        return f"Not even micro-batch {min(tries)} fits; tried {', '.join(tried)}"
    best, ds = max(used), run.deepspeed
    follows = "" if ds.gradient_accumulation_steps is None else " gradient_accumulation_steps=null"
    return (
        f"Micro-batch {best} is the largest that divides the global batch of {ds.train_batch_size} and fits: "
        f"{used[best].peak / 2**30:.2f} of {used[best].limit / 2**30:.2f} GiB on the rank that used most "
        f"(tried {', '.join(tried)})\n  train_micro_batch_size_per_gpu={best}{follows}"
    )


def bisect(candidates: Sequence[int], attempt: Callable[[int], Used | None]) -> dict[int, Used | None]:
    """Attempt candidates until the largest that fits is known, assuming that all smaller ones fit too."""
    tries: dict[int, Used | None] = {}
    # Candidates before `low` fit; those from `high` on do not.
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        tries[candidates[middle]] = used = attempt(candidates[middle])
        low, high = (middle + 1, high) if used else (low, middle)
    return tries


def _two_steps(run: RunConfig, vocab_size: int, limit: int, device: torch.device) -> Used:
    """Take two optimizer steps of at most two micro-batches each: in the second, Adam's moments exist."""
    batch = batch_plan(run.deepspeed, world_size())
    batch = replace(batch, accumulation=min(2, batch.accumulation))
    batch = replace(batch, global_batch=batch.micro_batch * batch.accumulation * batch.replicas)
    run = run.changed(
        f"train_batch_size={batch.global_batch}",
        f"gradient_accumulation_steps={batch.accumulation}",
        *("megagpt.schedule.first_batch=null", "megagpt.schedule.batch_ramp_steps=0"),
        *("megagpt.schedule.max_tokens=null", "megagpt.schedule.max_epochs=null"),
        f"megagpt.schedule.max_steps={run.megagpt.schedule.max_steps}",
    )
    cfg, compiled = run.megagpt, compiles(run.megagpt.compile, device)
    engine = build_engine(run, batch, vocab_size, device, compiled=compiled)
    shape = (batch.micro_batch, cfg.seq_len // batch.sequence_parallel_size)
    for _ in range(2 * batch.accumulation):
        inputs, targets = (torch.randint(0, vocab_size, shape, device=device) for _ in range(2))
        documents = None
        if PACKING[cfg.packing.kind].masked:
            documents = torch.zeros(batch.micro_batch, cfg.seq_len, dtype=torch.int32, device=device)
        score = next_token_score(
            targets,
            label_smoothing=cfg.regularization.label_smoothing,
            z_loss=cfg.regularization.z_loss,
            compiled=compiled,
        )
        engine.backward(engine(inputs, documents=documents, score=score))
        engine.step()
    if device.type == "cuda":
        return Used(torch.cuda.max_memory_reserved(device), limit)
    return Used(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, limit)


def _limit_memory(limit: int, device: torch.device) -> None:
    """Limit this process, so that an attempt fails before the machine's memory is full, or at the given limit."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / memory_of(device)), device)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _one_rank(run_file: str, micro_batch: str, vocab_size: str, gib: str, out: str, *overrides: str) -> int:
    """Run one rank of an attempt; rank 0 writes the memory used to `out`. Returns the exit code."""
    try:
        device = init_process_group()
        changed = [*overrides, f"train_micro_batch_size_per_gpu={micro_batch}", "gradient_accumulation_steps=null"]
        with errors_on_every_rank():
            run = load_run_config(Path(run_file), changed)
        run = with_supported_dtype(run, device)
        limit = int(float(gib) * 2**30) or memory_of(device)
        _limit_memory(limit, device)
        used = gather_objects(_two_steps(run, int(vocab_size), limit, device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    if is_main():
        most = max(used, key=lambda one: one.peak)
        Path(out).write_text(json.dumps({"peak": most.peak, "limit": most.limit}))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: _one_rank(*sys.argv[1:]), is_main=is_main))
