"""Compute the metrics that are logged: means over the steps since the last log line, speed, times in seconds."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megagpt.config.doubling import Doubling
from megagpt.config.run_file import RunConfig
from megagpt.distributed.process_group import world_size
from megagpt.guards.memory_growth import peak_memory
from megagpt.guards.step_window import StepMetrics
from megagpt.metrics.noise_scale import noise_scale
from megagpt.model.flops import flops_per_token, recompute_flops_per_token
from megagpt.planner.gpu_specs import peak_flops
from megagpt.terminal import duration


class Stopwatch:
    """Seconds since the last lap, by section; what no section claims is the training step's."""

    def __init__(self) -> None:
        self._started = self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time inside `with` for this section."""
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        """Return the seconds from the start to the last lap."""
        return self._began - self._started

    def spent(self, name: str) -> float:
        """Return the seconds of one section since the last lap."""
        return self._seconds.get(name, 0.0)

    def lap(self) -> dict[str, float]:
        """Return the seconds of each section, "data" and "step" always among them, and begin a new lap."""
        now = time.perf_counter()
        seconds = {"data": 0.0} | self._seconds
        seconds["step"] = now - self._began - sum(seconds.values())
        self._began, self._seconds = now, {}
        return seconds


class Pace:
    """Tells after two steps how long a run takes, where its next log line is far away."""

    PATIENCE = 60.0  # seconds until that line, in which nobody wonders

    def __init__(self, first: int, last: int, every_log: int, batches: Doubling) -> None:
        self._first, self._last, self._every, self._batches = first, last, every_log, batches
        self._began = 0.0

    def __call__(self, step: int) -> str:
        """Return a line after the second step of this start, and otherwise nothing. The first one may compile."""
        if step == self._first + 1:
            self._began = time.perf_counter()
        if step != self._first + 2:
            return ""
        seconds, left = time.perf_counter() - self._began, self._last - step
        until_next = min(left, self._every - step % self._every) if self._every else left
        total = self._batches.total
        per_sample = seconds / (total(step) - total(step - 1))
        to_last, to_next = (per_sample * (total(step + n) - total(step)) for n in (left, until_next))
        if to_next < self.PATIENCE:
            return ""
        return (
            f"a step takes about {duration(seconds)}: {duration(to_last)} for the {left:,} that are left, and "
            f"{duration(to_next)} to the next line"
        )


def log_metrics(
    steps: StepMetrics,
    *,
    rates: Mapping[str, float],
    speed: Mapping[str, float],
    skipped_steps: int,
    epoch: float,
    seconds_per_step: Mapping[str, float],
    stragglers: Mapping[str, float],
    micro_batch: int | None,
    global_batches: Sequence[int],
) -> dict[str, float]:
    """Everything that is logged of some training steps, in the order of the log line.

    `micro_batch`, if given, and `global_batches` are for the noise scale.
    """
    noise = None
    if micro_batch is not None:
        sizes = steps.micro_squares.new_tensor(global_batches)
        noise = noise_scale(steps.micro_squares, steps.grad_norms**2, micro_batch, sizes)
    return {
        **steps.means(),
        **{f"optim/{name}": rate for name, rate in rates.items()},
        **speed,
        **({} if noise is None else {"optim/noise_scale": noise}),
        "optim/skipped_steps": skipped_steps,
        "data/epoch": epoch,
        "perf/seconds_per_step": seconds_per_step["step"],
        "data/wait_seconds_per_step": seconds_per_step["data"],
        **stragglers,
    }


def speed(
    run: RunConfig, vocab_size: int, tokens_per_sec: float, device: torch.device, *, steps: range, compiled: bool
) -> dict[str, float]:
    """Return the throughput of these steps over all ranks, and MFU and HFU where the GPU's peak is known.

    Evaluating and saving do not count. Attention costs what the rows of these steps make of it.
    MFU: model FLOPs over peak FLOPs (PaLM: Chowdhery et al. 2022, appendix B); HFU also counts recomputation.
    """
    found = {"perf/tokens_per_sec": tokens_per_sec, "perf/memory_gib": peak_memory(device) / 2**30}
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None or run.deepspeed.dtype == "fp32":  # published peaks are of 16-bit tensor cores
        return found
    cfg = run.megagpt
    rows, batches = cfg.schedule.rows(cfg.seq_len), cfg.schedule.batches(run.deepspeed.train_batch_size)
    model = cfg.model.model_copy(update={"seq_len": mean_length(rows, batches, steps)})
    again = recompute_flops_per_token(
        model,
        cfg.recompute,
        dropout=cfg.regularization.dropouts,
        zero3=run.deepspeed.zero_optimization.stage == 3,
        compiled=compiled,
    )
    flops, share = flops_per_token(model, vocab_size), tokens_per_sec / (peak * world_size())
    return found | {"perf/mfu": flops * share} | ({} if again is None else {"perf/hfu": (flops + again) * share})


def mean_length(rows: Doubling, batches: Doubling, steps: range) -> int:
    """Return the length of the row that a token lies in, on average over the tokens of these steps."""
    return round(sum(rows.at(s) * batches.at(s) for s in steps) / sum(batches.at(s) for s in steps))


def eta_seconds(run: RunConfig, begin: int, step: int, seconds: float) -> float:
    """Return the seconds to the last step, for a start that has taken `seconds` from step `begin` to `step`."""
    so_far = run.tokens(step)
    return (run.tokens(run.megagpt.schedule.max_steps) - so_far) * seconds / (so_far - run.tokens(begin))


def hyperparameters(run: RunConfig) -> dict[str, float | str]:
    """Return the settings by which runs are compared."""
    cfg, optimizer, adam = run.megagpt, run.deepspeed.optimizer, run.deepspeed.optimizer.params
    return {
        "lr": adam.lr,
        **({"muon_lr": adam.of_muon} if optimizer.type == "Muon" else {}),
        "global_batch": run.deepspeed.train_batch_size,
        "n_layer": cfg.model.n_layer,
        "n_embd": cfg.model.n_embd,
        "max_steps": cfg.schedule.max_steps,
        "seq_len": cfg.seq_len,
        "n_head": cfg.model.n_head,
        "warmup_steps": cfg.schedule.warmup_steps,
        "schedule": cfg.schedule.shape,
        "weight_decay": adam.weight_decay,
        "dropout": cfg.regularization.dropout,
        "optimizer": optimizer.type,
        "preset": cfg.model.preset or "gpt2",
        "dtype": run.deepspeed.dtype,
        "seed": cfg.seed,
    }
