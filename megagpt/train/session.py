"""A run in progress: a built engine with its instruments, and what happens between steps."""

import gc
import json
import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import torch

from megagpt.atomic_files import write_atomically
from megagpt.checkpoint.async_writer import Writer
from megagpt.checkpoint.commit import step_folder
from megagpt.checkpoint.finite import what_to_change
from megagpt.checkpoint.load import restore, resume, starting_weights
from megagpt.checkpoint.rng import seed_all
from megagpt.checkpoint.rotation import retract
from megagpt.checkpoint.save import save as save_checkpoint
from megagpt.config.schema import EMA_LOSS, LOSS
from megagpt.data.loader import Batch, prefetched, rank_samples, rank_share, rank_slice
from megagpt.data.packing import PACKING
from megagpt.data.provenance import documents_of
from megagpt.distributed.collectives import errors_on_every_rank, gather_objects, gather_over_ranks
from megagpt.distributed.launcher import grace_warning
from megagpt.distributed.process_group import is_main, print_rank0, rank
from megagpt.engine.build import Engine, before_update, build_engine, learning_rates, set_accumulation, set_step
from megagpt.engine.micro_batch_norms import MicroBatchNorms
from megagpt.errors import OwnRankError, UserError, writing_to
from megagpt.guards.memory_growth import MemoryWatch, memory_mib
from megagpt.guards.spikes import UpdateGate, judge_steps
from megagpt.guards.step_window import StepWindow
from megagpt.guards.stragglers import ForwardTimer, StragglerDetector
from megagpt.guards.watchdog import Watchdog
from megagpt.metrics.step_metrics import Stopwatch, eta_seconds, log_metrics, speed
from megagpt.terminal import YELLOW
from megagpt.train.early_stopping import after_evaluation, after_training, metrics_of
from megagpt.train.lr_schedule import lr_factor, muon_momentum, weight_decay_factor
from megagpt.train.monitor import Monitor, print_ending
from megagpt.train.opening import print_opening
from megagpt.train.preflight import RunSetup
from megagpt.train.roll_back import checkpoint_before_spike, state_after
from megagpt.train.samples import generated_samples, sample_lines
from megagpt.train.tasks import task_metrics
from megagpt.train.validation import Validation
from megagpt.train_state import TrainState


class Session:
    """A built engine and its instruments. All methods are collective: every rank calls them at the same steps."""

    def __init__(
        self,
        setup: RunSetup,
        device: torch.device,
        *,
        launcher_alive: Callable[[], bool] = lambda: True,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        run, batch, saved = setup.run, setup.batch, setup.saved
        self.setup, self.device, self.cfg, self.before_save = setup, device, run.megagpt, before_save
        # DeepSpeed itself skips updates that its loss scale made infinite.
        self.uses_loss_scale = run.deepspeed.fp16.enabled
        self.gate = UpdateGate(self.cfg.guards.spikes, setup.state.health, device)
        self.engine: Engine = build_engine(
            run,
            batch,
            setup.data.vocab_size,
            device,
            config=setup.deepspeed_config,
            compiled=setup.compiled,
            weights=None if setup.start is None else starting_weights(setup.start),
        )
        seed_all(self.cfg.seed + 1 + rank())  # dropout differs from rank to rank
        if saved is not None:
            resume(self.engine, saved, setup.record, self.cfg.seed)
        if not self.uses_loss_scale:
            before_update(self.engine, self.gate.before_update)
        self.row_length, self.global_batch = self.cfg.seq_len, batch.global_batch  # of the present step
        self.micro_batch_norms = MicroBatchNorms(self.engine, device, wanted=self.cfg.noise_scale)
        self.validation = Validation(self.engine, setup, device)
        self.stopwatch, self.frozen, self.grace_warned = Stopwatch(), False, False
        waits = run.deepspeed.zero_optimization.stage == 3 or batch.sequence_parallel_size > 1
        self.timer = ForwardTimer(device)
        self.stragglers = StragglerDetector(gather_objects(socket.gethostname()), forward_waits=waits)
        stacks = self.cfg.out_dir / f"stacks.{rank()}.txt"
        self.watchdog = Watchdog(self.cfg.guards.hang_timeout, rank(), stacks, launcher_alive)
        self.writer = Writer(asynchronous=self.cfg.save_async)
        self.memory_watch = MemoryWatch(self.cfg.guards.memory_growth_mib)
        self.rolled_back: list[int] = []  # the steps that were rolled back to
        print_opening(setup, device)
        with errors_on_every_rank():
            self.monitor = self._open_monitor()

    def _open_monitor(self) -> Monitor:
        """Open the run's monitors, and write the effective run file into its folder."""
        out_dir = self.cfg.out_dir
        with writing_to(out_dir):
            monitor = Monitor(self.setup.run, self.setup.state, also=self.engine.monitor.write_events)
            if is_main():
                write_atomically(out_dir / "run.json", json.dumps(self.setup.record.effective, indent=1).encode())
            return monitor

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches without end, from the position of the setup's state.

        Each is cut into rows of the length that the step has when it is taken.
        """
        batch, data = self.setup.batch, self.setup.data
        try:
            for whole in prefetched(
                self.setup.training_set.fill,
                rank_samples(batch, rank(), map(self.samples_of, count(self.setup.state.step))),
                (batch.micro_batch, self.cfg.seq_len + 1),
                self.device,
                transform=data.transform,
                document_end=data.tokenizer.eod_id if PACKING[self.cfg.packing.kind].masked else None,
                positions=rank_slice(self.cfg.seq_len, rank(), batch.sequence_parallel_size),
            ):
                yield whole.in_rows_of(self.row_length // batch.sequence_parallel_size)
        except UserError as error:  # a shard that was damaged after it was opened
            raise OwnRankError(str(error)) from error

    def samples_of(self, step: int) -> range:
        """Return the global batch of update `step` (0-based)."""
        return self.setup.training_set.mixture.samples_of(step + 1)

    def set_step(self, step: int) -> None:
        """Set the rates, weight decay, momentum, batch and row length of update `step` (0-based)."""
        params, schedule = self.setup.run.deepspeed.optimizer.params, self.cfg.schedule
        self.row_length = schedule.rows(self.cfg.seq_len).at(step)
        self.global_batch = len(self.samples_of(step))
        set_accumulation(self.engine, self.global_batch // (self.setup.batch.micro_batch * self.setup.batch.replicas))
        set_step(
            self.engine,
            params,
            lr_factor=lr_factor(step, schedule),
            weight_decay_factor=weight_decay_factor(step, schedule),
            momentum=muon_momentum(step, params.momentum, schedule),
        )

    def log(self, state: TrainState, window: StepWindow) -> tuple[TrainState, bool]:
        """Read the steps since the last log and judge them; returns the new state, and whether to roll back.

        Raises UserError, on every rank, where a guard stops the run.
        """
        steps = window.read(state.step, scaled=self.uses_loss_scale)
        verdict = judge_steps(
            state.health,
            steps,
            self.cfg.guards,
            documents=self._documents,
            what_to_change=lambda last_finite: self._what_to_change(state, last_finite, broken=True),
        )
        stopper = after_training(state.stopper, steps.sums(), self.cfg.early_stopping)
        state = replace(state, health=verdict.health, stopper=stopper)
        seconds = self.stopwatch.lap()
        own = torch.tensor([self.timer.lap(), seconds["data"]], device=self.device)
        memory, own = gather_over_ranks(torch.cat([memory_mib(self.device), own])).cpu().split(2, dim=1)
        slow = self.stragglers.judge(own, seconds["step"] + seconds["data"], len(steps))
        for line in (*verdict.lines, *self.memory_watch(state.step, memory), *slow):
            print_rank0(line, color=YELLOW)
        logged = range(state.step - len(steps), state.step)
        global_batches = [len(self.samples_of(step)) for step in logged]
        setup, n_tokens = self.setup, sum(global_batches) * self.cfg.seq_len
        tokens_per_sec = n_tokens / (seconds["step"] + seconds["data"])
        metrics = log_metrics(
            steps,
            rates=learning_rates(self.engine),
            speed=speed(
                setup.run, setup.data.vocab_size, tokens_per_sec, self.device, steps=logged, compiled=setup.compiled
            ),
            skipped_steps=state.health.skipped_steps,
            epoch=setup.training_set.epochs(state.samples_seen)[0],  # of the first dataset
            seconds_per_step={name: spent / len(steps) for name, spent in seconds.items()},
            stragglers=self.stragglers.metrics(own, len(steps)),
            micro_batch=setup.batch.micro_batch if self.cfg.noise_scale else None,
            global_batches=global_batches,
        )
        if not self.frozen:  # everything alive now stays alive: take it out of every later garbage collection
            gc.collect()
            gc.freeze()
            self.frozen = True
        eta = eta_seconds(setup.run, setup.state.step, state.step, self.stopwatch.total())
        self.monitor.log(state, metrics, eta_seconds=eta, waits_for=self.stragglers.slow)
        return state, verdict.roll_back

    def roll_back(self, state: TrainState) -> tuple[TrainState, Iterator[Batch]]:
        """Resume from the newest checkpoint with the samples after those seen up to now, as PaLM's runs did.

        (Chowdhery et al. 2022, section 5.1.) Raises UserError if there is no checkpoint, or if it did not help before.
        """
        with self.watchdog.paused():
            self.writer.wait()
            saved = checkpoint_before_spike(self.cfg.out_dir, state.step, self.rolled_back)
            resume(self.engine, saved, self.setup.record, self.cfg.seed)
        self.rolled_back.append(saved.state.step)
        self.validation.forget()
        data = self.setup.training_set.jumped(step=saved.state.step, sample=state.samples_seen)
        back = state_after(saved.state, state, self.cfg.early_stopping)
        print_rank0(
            f"rolled back from step {state.step} to {saved.step_dir}; samples {saved.state.samples_seen:,} to "
            f"{state.samples_seen - 1:,} are skipped"
        )
        self.setup = replace(self.setup, training_set=data, saved=replace(saved, state=back))
        with self.watchdog.paused():  # as trackers may be slow
            self.monitor.close("stopped")
            with errors_on_every_rank():
                self.monitor = self._open_monitor()
        self.stopwatch = Stopwatch()
        return back, self.batches()

    def evaluate(self, state: TrainState) -> TrainState:
        """Measure the validation sets, and count the loss that decides for early stopping; the same on every rank."""
        metrics = self._val_metrics(state.step)
        loss = metrics[EMA_LOSS if self.cfg.average_decides else LOSS]
        stopper = after_evaluation(state.stopper, loss, state.step, state.tokens_seen, self.cfg.early_stopping)
        metrics |= {"val/best_loss": stopper.best} | metrics_of(stopper, loss)
        self.monitor.log(state, metrics, is_best=stopper.best_step == state.step)
        return replace(state, val_loss=loss if math.isfinite(loss) else None, stopper=stopper)

    def evaluate_start(self, state: TrainState) -> None:
        """Measure the weights of another run that this one begins with; they count neither as best nor for patience."""
        self.monitor.log(state, self._val_metrics(state.step))

    def _val_metrics(self, step: int) -> dict[str, float]:
        with self.stopwatch.section("eval"), self.watchdog.paused():
            metrics = self.validation.metrics(step)
        return metrics | {"perf/eval_seconds": self.stopwatch.spent("eval")}

    def show_samples(self, state: TrainState) -> None:
        """Generate from the run file's prompts, and show the texts."""
        with self.stopwatch.section("sample"), self.watchdog.paused():
            try:
                samples = generated_samples(self.engine.module, self.setup.data.tokenizer, self.cfg.sample)
                self.monitor.samples(samples, state.step)
                print_rank0("\n".join(sample_lines(samples, state.step)))
            except UserError as error:
                print_rank0(f"no samples at step {state.step}: {error}")
        self.monitor.log(state, {"perf/sample_seconds": self.stopwatch.spent("sample")})

    def run_tasks(self, state: TrainState) -> None:
        """Run the run file's tasks, and log their metrics."""
        setup = self.setup
        assert setup.tasks is not None, "megagpt.every.tasks is set"
        with self.stopwatch.section("tasks"), self.watchdog.paused():
            metrics = task_metrics(
                setup.tasks,
                self.engine.module,
                setup.data.tokenizer,
                micro_batch=setup.batch.micro_batch,
                step=state.step,
            )
        self.monitor.log(state, metrics | {"perf/tasks_seconds": self.stopwatch.spent("tasks")})

    def is_new_best(self, state: TrainState) -> bool:
        """Tell whether early stopping will want this step's weights back."""
        return self.cfg.early_stopping.restore_best and state.stopper.best_step == state.step

    def save(self, state: TrainState, *, last: bool) -> bool:
        """Save a checkpoint; with `save_async`, training waits only for the copy to host memory.

        Returns False, and saves nothing, after a step or an evaluation that was not finite: the weights may be the
        reason. The next finite step then shows that they are not, and is saved in its place. If this step is the `last`
        of this start, or the best, a finite evaluation shows it.
        """
        if state.health.bad_in_a_row and (last or self.is_new_best(state)):
            if self.validation.step != state.step:
                self._val_metrics(state.step)
            # as after a finite step: what is saved can be resumed from
            state = replace(state, health=replace(state.health, bad_in_a_row=0))
        if state.health.bad_in_a_row or self.validation.not_finite(state.step):
            print_rank0(
                f"step {state.step} was not finite, so it is not saved" + "; the next finite step is" * (not last)
            )
            return False
        with self.stopwatch.section("save"), self.watchdog.paused():
            self.before_save()
            save_checkpoint(self.engine, state, self.setup.training_set.mixture, self.setup.record, self.writer)
        waited, wrote = self.stopwatch.spent("save"), self.writer.seconds  # `wrote`: of the save before this one
        self.monitor.log(
            state, {"perf/save_seconds": waited} | ({"perf/write_seconds": wrote} if self.cfg.save_async else {})
        )
        measured = wrote > 0.0 or not self.cfg.save_async  # an asynchronous write has ended
        if measured and not self.grace_warned and (warning := grace_warning(waited, wrote)):
            print_rank0(warning, color=YELLOW)
            self.grace_warned = True
        return True

    def close(self, state: TrainState, reason: str, *, saved: bool = True) -> None:
        """Print how the run ended, now that all is saved; after early stopping, restore the best weights.

        Raises UserError, on every rank, if the last step could not be saved.
        """
        if not saved:
            last_finite, broken = state.step - state.health.bad_in_a_row, self.validation.not_finite(state.step)
            raise UserError(
                f"step {state.step}, the last, was not finite, so it was not saved. "
                + self._what_to_change(state, last_finite, broken=broken)
            )
        if state.stopper.stopped and self.cfg.early_stopping.restore_best:
            best_dir = step_folder(self.cfg.out_dir, state.stopper.best_step)
            restore(self.engine, best_dir, self.setup.record)
        gc.unfreeze()
        print_ending(self.cfg, state, reason)

    def _what_to_change(self, state: TrainState, last_finite: int, *, broken: bool) -> str:
        """Return the advice when no step after `last_finite` was finite. Collective.

        `broken`: if this start saved that step, its own update broke its weights, and no run can resume from it. A step
        that an earlier start saved stays: what is wrong may be this start's machine.
        """
        self.writer.wait()
        if broken and last_finite > self.setup.state.step:
            with errors_on_every_rank():
                if is_main():
                    retract(self.cfg.out_dir, last_finite, state)
        return what_to_change(self.cfg.out_dir, last_finite)

    def _documents(self, step: int, r: int) -> str:
        """Name the first documents that rank r read in a step, and where they came from."""
        samples = rank_share(self.samples_of(step - 1), self.setup.batch, r)
        return documents_of(self.setup.training_set, samples, self.cfg.out_dir, step)
