"""What watches a run's numbers, and acts on every rank alike when they go wrong. step_window.py says what wrong is."""

import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megagpt.config.deepspeed import RunConfig
from megagpt.config.schema import GuardsConfig, SpikesConfig
from megagpt.data.provenance import origins
from megagpt.data.training_set import TrainData
from megagpt.distributed.process_group import gather_over_ranks, world_size
from megagpt.engine.precision import adam_on_the_host
from megagpt.errors import UserError
from megagpt.guards.step_window import Steps, after_steps, extended, history_of, is_spike, mean_loss
from megagpt.train_state import Health

WINDOW = 1000  # steps in which memory is looked at together
GROWING = 3  # windows in a row


@dataclass
class Recent:
    """The numbers of the steps since they were last read, on the device until then."""

    losses: list[Tensor] = field(default_factory=list)  # this rank's, over all its targets
    shares: list[Tensor] = field(default_factory=list)  # of its targets that have one
    grad_norms: list[Tensor | float | None] = field(default_factory=list)
    skipped: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, share: Tensor, grad_norm: Tensor | float | None, skipped: Tensor) -> None:
        self.losses.append(loss)
        self.shares.append(share)
        self.grad_norms.append(grad_norm)
        self.skipped.append(skipped)

    def read(self, last_step: int, *, scaled: bool) -> Steps:
        """Wait for the device, and gather over ranks."""
        n = len(self.losses)
        found = gather_over_ranks(torch.stack([*self.losses, *self.shares])).cpu().double()  # (world_size, 2 n)
        rank_losses, shares = found.split(n, dim=1)
        grad_norms = torch.stack([_norm(norm, self.losses[0].device) for norm in self.grad_norms]).cpu().double()
        return Steps(
            last_step,
            rank_losses,
            shares.sum(0),
            grad_norms,
            torch.stack(self.skipped).cpu() | ~grad_norms.isfinite(),
            scaled,
        )


def _norm(norm: Tensor | float | None, device: torch.device) -> Tensor:
    return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)


class Gate:
    """Stands before the optimizer, which changes nothing where the gate is closed. The device decides: nothing is read.

    It closes if the gradient norm, which is one of all ranks, is not finite, and for spikes if told to. torch's fused
    kernels leave weights, moments and step count alone where `found_inf` is 1, as they do for torch.amp.GradScaler.
    Where DeepSpeed leaves an update out by itself, the gate is not even asked.
    """

    def __init__(self, spikes: SpikesConfig, health: Health, device: torch.device) -> None:
        self._spikes = spikes
        self._history = history_of(health, device)
        self._open = torch.zeros((), dtype=torch.bool, device=device)
        self._losses: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._closed: Tensor | None = None

    def next_step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two lists for the losses and shares of the step's micro-batches, to be full when the optimizer is asked."""
        if (
            self._losses and self._closed is None
        ):  # DeepSpeed left that update out: it counts as step_window.py counts it
            self._history = extended(self._history, self._history.new_full((2,), torch.nan), self._spikes.window)
        self._losses, self._shares, self._closed = [], [], None
        return self._losses, self._shares

    @property
    def closed(self) -> Tensor:
        """bool (): whether it was, in this step."""
        return self._open if self._closed is None else self._closed

    def before_update(self, optimizer: Optimizer, grad_norm: Tensor | float | None) -> None:
        if self._closed is None:  # ZeRO asks for each group of parameters
            norm = _norm(grad_norm, self._open.device)
            self._closed = ~norm.isfinite()
            if self._spikes.action == "skip":
                self._closed = self._closed | self._is_spike(norm)
        optimizer.found_inf = self._closed.float()  # type: ignore[attr-defined]

    def _is_spike(self, norm: Tensor) -> Tensor:
        own = torch.stack([torch.stack(self._losses).mean(), torch.stack(self._shares).mean()])
        loss = mean_loss(*gather_over_ranks(own).double().sum(0).unbind())
        now = torch.stack([loss, norm.double()])
        spike = is_spike(self._history, now, self._spikes)
        self._history = extended(self._history, now, self._spikes.window)
        return spike


def check_skipping(run: RunConfig, device: torch.device) -> None:
    """Raises UserError where a spike could not be left out on the device."""
    if run.megagpt.guards.spikes.action != "skip":
        return
    if run.deepspeed.fp16.enabled or adam_on_the_host(run.deepspeed, device):
        raise UserError(
            "megagpt.guards.spikes.action='skip' is not for fp16, and where the optimizer is offloaded it needs "
            "optimizer.params.torch_adam; set it to 'log', 'stop' or 'roll back'"
        )


@dataclass(frozen=True)
class Verdict:
    health: Health
    roll_back: bool
    lines: tuple[str, ...]  # to be said


def judge(health: Health, steps: Steps, cfg: GuardsConfig, documents: Callable[[int, int], str]) -> Verdict:
    """What some steps mean for the run. `documents` names those that a step had on a rank.

    Raises UserError where the run is to stop, on all ranks alike.
    """
    health, spikes, too_many = after_steps(health, steps, cfg)
    bad, lines = steps.bad().tolist(), []
    for i in (i for i in range(len(steps)) if bad[i]):
        where, what = _not_finite(steps, i)
        if i == too_many:
            raise UserError(
                f"{what}; steps in a row that were not finite: {cfg.max_bad_steps}. Nothing was saved over the last "
                "checkpoint. Lower optimizer.params.lr or gradient_clipping, or raise megagpt.schedule.warmup_steps, "
                f"and start again: the run goes on from that checkpoint. What this step saw: "
                f"{documents(steps.number(i), where)}"
            )
        lines.append(f"{what}; " + ("its update was left out" if steps.skipped[i] else "its update was made"))
    for i in spikes if cfg.spikes.action != "none" else []:
        what = (
            f"a spike at step {steps.number(i)}: loss {float(steps.losses[i]):.4f}, gradient norm "
            f"{float(steps.grad_norms[i]):.4f}, one of them more than {cfg.spikes.sigma:g} deviations above the last "
            f"{cfg.spikes.window} steps"
        )
        if cfg.spikes.action == "stop":
            raise UserError(
                f"{what}; megagpt.guards.spikes.action is to stop, and nothing was saved over the last checkpoint. "
                f"What it saw: {documents(steps.number(i), _worst(steps, i))}"
            )
        lines.append(what + ("; its update was left out" if steps.skipped[i] else ""))
    return Verdict(health, bool(spikes) and cfg.spikes.action == "roll back", tuple(lines))


def _not_finite(steps: Steps, i: int) -> tuple[int, str]:
    """The first rank that saw step i go wrong, and what it saw."""
    ranks = (~steps.rank_losses[:, i].isfinite()).nonzero().flatten().tolist()
    if ranks:
        return ranks[0], f"the loss is {steps.rank_losses[ranks[0], i]} at step {steps.number(i)} on rank {ranks[0]}"
    return _worst(steps, i), f"the gradient norm is {steps.grad_norms[i]} at step {steps.number(i)}"


def _worst(steps: Steps, i: int) -> int:
    """The rank with the highest loss in step i."""
    return int(steps.rank_losses[:, i].argmax())


def documents_of(data: TrainData, samples: Iterable[int], run: Path, step: int, limit: int = 5) -> str:
    """Where the first documents of these samples came from."""

    def named() -> Iterable[str]:
        for sample in samples:
            for piece in data.pieces(sample):
                rows = piece.dataset.stream("train", piece.variant).rows_of(piece.start, len(piece.tokens))
                for origin in origins(piece.dataset, "train", rows):
                    yield f"{piece.dataset.path}, {origin}"

    try:
        found = list(islice(named(), limit))
    except UserError as error:
        found = [str(error)]
    return "; ".join(found) + f"; `python -m data_tools inspect {run} --step {step}` shows all"


def compare_weights(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raises UserError, on every rank, if a parameter that all ranks hold has other bits on one of them. Collective.

    Under ZeRO-3 those are the small parameters that DeepSpeed keeps whole; of the others each rank has its own part.
    """
    whole = [(name, p.detach()) for name, p in named if p.numel() > 0]
    if world_size() == 1 or not whole:
        return
    sums = gather_over_ranks(torch.stack([_sum_of_bits(p) for _, p in whole])).cpu()  # (world_size, parameters)
    usual = sums.mode(dim=0).values
    differ = (sums != usual).any(dim=0).nonzero().flatten().tolist()
    if differ:
        ranks = sorted({r for n in differ for r in (sums[:, n] != usual[n]).nonzero().flatten().tolist()})
        one_of_two = "one of the two is wrong, which is unknown" if world_size() == 2 else f"wrong on rank {ranks}"
        raise UserError(
            f"after step {step} the ranks no longer have the same weights: {whole[differ[0]][0]}"
            + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
            + f" ({one_of_two}); a bit flipped in memory, or a computation went wrong. Nothing was saved over the last "
            "checkpoint: take that machine out and start again, the run goes on from there"
        )


def _sum_of_bits(p: Tensor) -> Tensor:
    """int64 (): modulo 2^64, so that any one bit that flips changes it."""
    return p.view(torch.int32 if p.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


class MemoryWatch:
    """Says, once, that memory grows and grows: by more than the limit from window to window, three times in a row.

    Windows of 1000 steps are compared by the least that each saw, so buffers that come and go do not count,
    nor does what grows once, at the start or at the first evaluation or save.
    """

    KINDS = ("memory", "GPU memory")

    def __init__(self, growth_mib: float) -> None:
        """`growth_mib` per window; 0: never."""
        self._limit, self._lows, self._next, self._said = growth_mib, list[Tensor](), 0, False

    def __call__(self, step: int, mib: Tensor) -> Sequence[str]:
        """mib (world_size, kinds) at this step."""
        if self._limit == 0.0 or self._said:
            return ()
        if step < self._next:
            self._lows[-1] = torch.minimum(self._lows[-1], mib)
            return ()
        self._next = step + WINDOW
        self._lows = [*self._lows[-GROWING - 1 :], mib]
        ended = torch.stack(self._lows[:-1]) if len(self._lows) > 1 else mib.new_zeros(0, *mib.shape)
        growing = (ended.diff(dim=0) > self._limit).all(0) if len(ended) == GROWING + 1 else mib < 0
        for r, kind in growing.nonzero().tolist():
            self._said = True
            return (
                f"the {self.KINDS[kind]} of rank {r} has grown from {ended[0, r, kind]:.0f} to "
                f"{ended[-1, r, kind]:.0f} MiB in {GROWING * WINDOW} steps, and grows on",
            )
        return ()


def memory_mib(device: torch.device) -> Tensor:
    """(2,): what this process holds itself, files that are mapped into it aside, and what it has allocated on a GPU."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    own = sum(float(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10
    gpu = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return torch.tensor([own, gpu], device=device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
