"""Write metrics for people and machines: a line in the terminal, metrics.jsonl, TensorBoard, trackers.

Only rank 0 writes. A full disk or a tracker that fails does not end a run here: the disk may be free again before the
next save, which stops all ranks if it is not, and a later start sends a tracker what it lacks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from megagpt.checkpoint.commit import best, committed
from megagpt.config.run_file import RunConfig
from megagpt.config.schema import EMA_LOSS, LOSS, MegaGPTConfig
from megagpt.distributed.process_group import is_main, print_rank0
from megagpt.errors import writing_to
from megagpt.evaluation.tasks import TASKS
from megagpt.metrics.csv_files import CsvFiles
from megagpt.metrics.metrics_file import (
    LOSS_OF_SET,
    METRICS,
    SAMPLES,
    append_row,
    append_samples,
    keep_up_to,
    metrics_of,
    new_row,
    read_rows,
)
from megagpt.metrics.tensorboard_file import TensorBoardFile
from megagpt.metrics.trackers import Feed, Outcome, close_feeds, open_feeds
from megagpt.terminal import GREEN, if_encodable, typed
from megagpt.train.early_stopping import way_on, why_stopped
from megagpt.train_state import TrainState

LEAST_POINTS = 3  # that are drawn as bars: two would be the shortest and the longest, however near
Events = Callable[[list[tuple[str, float, int]]], None]


class Monitor:
    """One for each run. `resumed`: the state that training resumes from; what was logged after it is dropped."""

    def __init__(self, run: RunConfig, resumed: TrainState, *, also: Events) -> None:
        self._max_steps = run.megagpt.schedule.max_steps
        self._also, self._failed = also, set[str]()
        self._board: TensorBoardFile | None = None
        self._csv: CsvFiles | None = None
        self._feeds: list[Feed] = []
        if not is_main():
            return
        self._metrics_file, self._samples_file = run.megagpt.out_dir / METRICS, run.megagpt.out_dir / SAMPLES
        logged = read_rows(self._metrics_file)
        # first, as a tracker may refuse the run file
        self._feeds = open_feeds(run, [row for row in logged if row["step"] <= resumed.step], logged)
        try:
            self._open_files(run, resumed.step)
        except BaseException:
            self.close("failed")
            raise

    def _open_files(self, run: RunConfig, step: int) -> None:
        """Open the files of this start, `step` being the one that it resumes from."""
        # A start at step 0 resumes nothing, and measures again what weights of another run gave.
        rows = keep_up_to(self._metrics_file, step or -1)
        keep_up_to(self._samples_file, step)
        csv, board, out_dir = run.deepspeed.csv_monitor, run.deepspeed.tensorboard, run.megagpt.out_dir
        if csv.enabled:
            with writing_to(*_folder_key("csv_monitor", csv.output_path, csv.job_name, out_dir)):
                self._csv = CsvFiles(run, rows)
        if board.enabled:
            with writing_to(*_folder_key("tensorboard", board.output_path, board.job_name, out_dir)):
                self._board = TensorBoardFile(run, step, rows)

    def log(
        self,
        state: TrainState,
        metrics: dict[str, float],
        *,
        eta_seconds: float | None = None,
        waits_for: Sequence[str] = (),
        is_best: bool = False,
    ) -> None:
        """Record metrics of the step just finished.

        `waits_for`: hosts that are stragglers. `is_best`: no evaluation before was as good.
        """
        if not is_main():
            return
        row = new_row(state.step, state.tokens_seen, metrics)
        with self._continuing_without(METRICS):
            append_row(self._metrics_file, row)
        with self._continuing_without("TensorBoard"):
            if self._board:
                self._board.log(row)
        with self._continuing_without("CSV files"):
            if self._csv:
                self._csv.log(row)
        for feed in self._feeds:
            feed.log(row)
        with self._continuing_without("Comet"):
            self._also([(name, value, state.step) for name, value in metrics_of(row).items()])
        named = ON_THE_LINE | {name: name for name in metrics if name.startswith(LOSS_OF_SET)}
        named |= {name: name for name in [name for name in metrics if name.startswith(TASKS)][:MOST_TASKS]}
        shown = [f"{named[name]} {_short(name, value)}" for name, value in metrics.items() if name in named]
        if waits_for:
            shown.append(f"waits for {', '.join(waits_for)}")
        if eta_seconds is not None:
            shown.append(f"eta {timedelta(seconds=round(eta_seconds))}")
        if is_best:
            shown.append("best")
        if shown:
            line = f"step {state.step:>{len(str(self._max_steps))}}/{self._max_steps} | " + " | ".join(shown)
            print_rank0(line, color=GREEN if is_best else None)

    def samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """Record generated texts, each a prompt and its continuation, in samples.jsonl and TensorBoard."""
        if not is_main():
            return
        with self._continuing_without(SAMPLES):
            append_samples(self._samples_file, samples, step)
        with self._continuing_without("TensorBoard"):
            if self._board:
                self._board.samples(samples, step)

    def close(self, outcome: Outcome) -> None:
        """Send trackers what they have not taken yet, and how this start ended."""
        close_feeds(self._feeds, outcome)

    @contextmanager
    def _continuing_without(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a tracker: any
            if what not in self._failed:
                print_rank0(f"metrics cannot be written to {what} ({error}); training continues without them")
            self._failed.add(what)


def _folder_key(section: str, output_path: str, job_name: str, out_dir: Path) -> tuple[Path | str, str]:
    """Return the value and the name of the key that decides where a section's files are."""
    if output_path:
        return output_path, f"{section}.output_path"
    return (job_name, f"{section}.job_name") if job_name else (out_dir, "megagpt.out_dir")


MOST_TASKS = 6  # metrics of tasks on a line

# The metrics that the terminal shows -> how it names them.
ON_THE_LINE = {
    "train/loss": "train/loss",
    "val/loss": "val/loss",
    "val/perplexity": "perplexity",
    "val/bits_per_byte": "bits_per_byte",
    "val/ema_loss": "ema_loss",
    "optim/lr": "lr",
    "optim/muon_lr": "muon_lr",
    "optim/grad_norm": "grad_norm",
    "perf/tokens_per_sec": "tokens_per_sec",
    "perf/mfu": "mfu",
}


def print_ending(cfg: MegaGPTConfig, state: TrainState, reason: str = "") -> None:
    """Print how a run ended: its validation curve, the reason, and its best checkpoint."""
    if not is_main():
        return
    stopper = state.stopper
    if stopper.stopped:
        why = f"stopped early at step {state.step}: {why_stopped(stopper, cfg.early_stopping)}"
    elif state.finished(cfg.schedule.max_steps):
        why = f"finished at step {state.step}"
    else:
        why = f"stopped at step {state.step} ({reason or 'asked by another rank'}) and saved; the same command resumes"
    lines = [why]
    if stopper.best_step:
        metrics_file = cfg.out_dir / METRICS
        lines = [
            validation_curve(metrics_file, cfg.early_stopping.monitor),
            why,
            _best_loss(cfg, state, validation_losses(metrics_file, cfg.early_stopping.monitor)),
        ]
    lines += _best_checkpoint(cfg)
    if state.finished(cfg.schedule.max_steps) and committed(cfg.out_dir):
        lines.append(f'try it: megagpt generate {typed(cfg.out_dir)} --prompt "Once upon a time"')
    print_rank0("\n".join(lines))


def print_nothing_left(cfg: MegaGPTConfig, state: TrainState) -> None:
    """Print that a run was finished before this start, and the key that makes it train further."""
    if not is_main():
        return
    named, step, (key, last) = _best_checkpoint(cfg), state.step, cfg.schedule.length
    if step >= cfg.schedule.max_steps:
        why = f"already finished at step {step}, and {key}={last}; "
        way_out = f"raise {key} to train further"
    else:
        why = f"already stopped early at step {step}: {why_stopped(state.stopper, cfg.early_stopping)}; "
        way_out = way_on(state.stopper, cfg.early_stopping)
    print_rank0("\n".join([why + way_out, *named]))


def _best_loss(cfg: MegaGPTConfig, state: TrainState, losses: dict[int, float | None]) -> str:
    """Name the step that counts as best, and the rule if it is not that of the lowest loss."""
    stopper = state.stopper
    line = f"best {cfg.early_stopping.monitor} {stopper.best:.4f} at step {stopper.best_step}"
    own = {step: loss for step, loss in losses.items() if step}  # not of weights that the run began with
    finite = {step: loss for step, loss in own.items() if loss is not None and math.isfinite(loss)}
    lowest = min(finite, key=lambda step: finite[step], default=None)
    if lowest is None or finite[lowest] >= stopper.best:
        return line
    rule = f"not lower by megagpt.early_stopping.min_delta={cfg.early_stopping.min_delta:g}"
    if finite[lowest] < stopper.best - cfg.early_stopping.min_delta:
        rule = "measured with another megagpt.early_stopping.min_delta"
    return f"{line}; the {finite[lowest]:.4f} of step {lowest} does not count, as it was {rule}"


def _best_checkpoint(cfg: MegaGPTConfig) -> list[str]:
    return [] if (named := best(cfg.out_dir)) is None else [f"best checkpoint: {named}"]


def validation_losses(metrics_file: Path, monitor: str = LOSS) -> dict[int, float | None]:
    """Return the losses that decide by step, of the weights or of their averages; None for one that was not finite."""
    name = EMA_LOSS if monitor.startswith(EMA_LOSS) else LOSS
    return {row["step"]: row[name] for row in read_rows(metrics_file) if name in row}


def validation_curve(metrics_file: Path, name: str = LOSS, width: int = 40, rows: int = 12) -> str:
    """Draw the run's validation losses as bars from the lowest to the highest, under the name of what decides."""
    losses = validation_losses(metrics_file, name)
    if not losses:
        return "    no validation losses in metrics.jsonl"
    steps = list(losses)
    shown = dict.fromkeys([*steps[:: max(1, -(-len(steps) // rows))], steps[-1]])
    finite = [loss for step in shown if (loss := losses[step]) is not None and math.isfinite(loss)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    drawn = len(finite) >= LEAST_POINTS
    lines, block = [], if_encodable("█", "#")
    for step in shown:
        loss = losses[step]
        if loss is not None and math.isfinite(loss):
            bar = block * (1 + round((width - 1) * (loss - low) / (high - low or 1.0)))
            lines.append(f"  {step:>8} {loss:8.4f} {bar}" if drawn else f"  {step:>8} {loss:8.4f}")
        else:
            lines.append(f"  {step:>8} not finite")
    title = f"    step {name}" + (f" (bars from {low:.4f} to {high:.4f})" if drawn else "")
    return f"{title}\n" + "\n".join(lines)


def _short(name: str, value: float) -> str:
    if name == "perf/tokens_per_sec":
        return f"{value:,.0f}"
    if name == "perf/mfu":
        return f"{value:.1%}"
    return f"{value:.2e}" if name in ("optim/lr", "optim/muon_lr") else f"{value:.4f}"
