"""One training run in progress: a built engine, and what happens between steps."""

import gc
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from megagpt.atomic_files import write_atomically
from megagpt.checkpoint.async_writer import Writer
from megagpt.checkpoint.commit import step_folder
from megagpt.checkpoint.identity import changed_keys, layout_changes
from megagpt.checkpoint.load import restore, resume
from megagpt.checkpoint.rng import seed_all
from megagpt.checkpoint.save import save as save_checkpoint
from megagpt.checkpoint.verification import newest_verified
from megagpt.data.loader import Batch, prefetched, rank_samples, rank_slice
from megagpt.data.provenance import documents_of
from megagpt.distributed.collectives import gather_objects, gather_over_ranks, on_every_rank
from megagpt.distributed.launcher import grace_warning
from megagpt.distributed.process_group import is_main, print_rank0, rank, world_size
from megagpt.engine.build import Engine, before_update, build_engine
from megagpt.engine.compilation import compiles
from megagpt.engine.deepspeed_config import effective_config
from megagpt.errors import OwnRankError, UserError, writing_to
from megagpt.guards.memory_growth import MemoryWatch, memory_mib, peak_memory
from megagpt.guards.spikes import UpdateGate, check_skipping, judge
from megagpt.guards.step_window import StepWindow
from megagpt.guards.stragglers import ForwardTimer, StragglerDetector
from megagpt.guards.watchdog import Watchdog
from megagpt.model.flops import flops_per_token, recompute_flops_per_token
from megagpt.model.generate import complete
from megagpt.planner.gpu_specs import peak_flops
from megagpt.train.early_stopping import after_evaluation
from megagpt.train.evaluate import evaluate
from megagpt.train.metrics import Stopwatch
from megagpt.train.monitor import Monitor, say_ending
from megagpt.train.preflight import RunSetup
from megagpt.train_state import TrainState

ROLL_BACKS = 3  # to one checkpoint


class Session:
    """A built engine and its instruments. All methods are collective: every rank calls them at the same steps."""

    def __init__(
        self, plan: RunSetup, device: torch.device, *, launcher_alive: Callable[[], bool] = lambda: True
    ) -> None:
        run, batch = plan.run, plan.batch
        self.plan, self.device, self.cfg = plan, device, run.megagpt
        self.scaled = run.deepspeed.fp16.enabled  # DeepSpeed itself leaves out what its loss scale made infinite
        self.effective = {**run.as_json(), **effective_config(run, batch, plan.vocab_size, device)}
        saved = plan.saved
        changes = layout_changes(saved.step_dir, saved.identity, plan.identity, self.effective) if saved else []
        check_skipping(run, device)
        self.compiled = compiles(self.cfg.compile, device)
        self.engine: Engine = build_engine(run, batch, plan.vocab_size, device, compiled=self.compiled)
        seed_all(self.cfg.seed + 1 + rank())  # dropout differs from rank to rank
        if saved is not None:
            resume(self.engine, saved, changes, self.cfg.seed)
        self.gate = UpdateGate(self.cfg.guards.spikes, plan.state.health, device)
        if not self.scaled:
            before_update(self.engine, self.gate.before_update)
        self.monitor = on_every_rank(self._open)
        print_rank0(_opening(plan, self.effective))
        self.token_bytes = torch.from_numpy(plan.tokenizer.token_bytes()).to(device)
        self.watch, self.warm, self.warned = Stopwatch(), False, False
        waits = run.deepspeed.zero_optimization.stage == 3 or batch.sequence_parallel_size > 1
        self.clock, self.cluster = (
            ForwardTimer(device),
            StragglerDetector(gather_objects(socket.gethostname()), forward_waits=waits),
        )
        stacks = self.cfg.out_dir / f"stacks.{rank()}.txt"
        self.watchdog = Watchdog(self.cfg.guards.hang_timeout, rank(), stacks, launcher_alive)
        self.writer = Writer(beside=self.cfg.save_async)
        self.memory_watch = MemoryWatch(self.cfg.guards.memory_growth_mib)
        self.rolled_back: list[int] = []  # steps gone back to

    def _open(self) -> Monitor:
        """The run's folder."""
        out_dir = self.cfg.out_dir
        with writing_to(out_dir):
            if is_main():
                out_dir.mkdir(parents=True, exist_ok=True)
                write_atomically(out_dir / "run.json", json.dumps(self.effective, indent=1).encode())
            return Monitor(self.plan.run, self.plan.state, also=self.engine.monitor.write_events)

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, endlessly, from where the plan's state stands."""
        firsts = rank_samples(self.plan.batch, rank(), self.plan.state.samples_seen)
        shape = (self.plan.batch.micro_batch, self.cfg.seq_len + 1)
        try:
            yield from prefetched(
                self.plan.train_data.fill,
                firsts,
                shape,
                self.device,
                rework=self.plan.rework,
                document_end=self.plan.val_blocks.document_end,
                positions=rank_slice(self.cfg.seq_len, rank(), self.plan.batch.sequence_parallel_size),
            )
        except UserError as error:  # a shard that went bad since it was opened
            raise OwnRankError(str(error)) from error

    def log(self, state: TrainState, recent: StepWindow) -> tuple[TrainState, bool]:
        """Read the steps since the last log, and judge them; returns whether to roll back too.

        Raises UserError, on all ranks alike, where they mean that the run is to stop.
        """
        steps = recent.read(state.step, scaled=self.scaled)
        verdict = judge(state.health, steps, self.cfg.guards, self._documents)
        state = replace(state, health=verdict.health)
        seconds, n_steps = self.watch.lap(), len(steps)
        own = torch.tensor([self.clock.lap(), seconds["data"]], device=self.device)
        memory, own = gather_over_ranks(torch.cat([memory_mib(self.device), own])).cpu().split(2, dim=1)
        slow = self.cluster.judge(own, seconds["step"] + seconds["data"], n_steps)
        for line in (*verdict.lines, *self.memory_watch(state.step, memory), *slow):
            print_rank0(line)
        n_tokens = n_steps * self.plan.batch.global_batch * self.cfg.seq_len
        metrics = {
            **steps.means(),
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            **self._speed(n_tokens / (seconds["step"] + seconds["data"])),
            "skipped_steps": state.health.skipped_steps,
            "epoch": self.plan.train_data.epochs(state.samples_seen)[0],  # of the first dataset
            **{f"seconds/{name}": seconds[name] for name in ("data", "step")},
            **self.cluster.metrics(own, n_steps),
        }
        if not self.warm:  # what lives now stays, and no collection looks at it again
            gc.collect()
            gc.freeze()
            self.warm = True
        steps_left, steps_done = self.cfg.schedule.max_steps - state.step, state.step - self.plan.state.step
        eta = steps_left * self.watch.total() / steps_done
        self.monitor.log(state, metrics, eta_seconds=eta, waits_for=self.cluster.slow)
        return state, verdict.roll_back

    def roll_back(self, state: TrainState) -> tuple[TrainState, Iterator[Batch]]:
        """Go on from the newest checkpoint with the samples after those seen up to now (as PaLM's runs did:
        Chowdhery et al. 2022, section 5.1). Raises UserError if there is none, or if it did not help before.
        """
        with self.watchdog.paused():
            self.writer.wait()
            saved = newest_verified(self.cfg.out_dir)
            if saved is None or self.rolled_back.count(saved.state.step) == ROLL_BACKS:
                raise UserError(
                    f"a spike before step {state.step}, and "
                    + ("no checkpoint to go back to" if saved is None else f"{ROLL_BACKS} times from the same step")
                    + "; lower optimizer.params.lr or gradient_clipping, or set megagpt.guards.spikes.action"
                )
            changes = layout_changes(saved.step_dir, saved.identity, self.plan.identity, self.effective)
            resume(self.engine, saved, changes, self.cfg.seed)
        self.rolled_back.append(saved.state.step)
        data = self.plan.train_data
        data.mixture = data.mixture.jumped(step=saved.state.step, sample=state.samples_seen)
        health = replace(saved.state.health, spikes=state.health.spikes)
        back = replace(saved.state, samples_seen=state.samples_seen, health=health)
        print_rank0(
            f"rolled back from step {state.step} to {saved.step_dir}; samples {saved.state.samples_seen:,} to "
            f"{state.samples_seen - 1:,} are left out"
        )
        self.plan = replace(self.plan, saved=replace(saved, state=back))
        self.monitor.close()
        self.monitor = on_every_rank(self._open)
        self.watch = Stopwatch()
        return back, self.batches()

    def evaluate(self, state: TrainState) -> TrainState:
        """Validation loss, and what it means for early stopping; the same on every rank."""
        with self.watch.section("eval"), self.watchdog.paused():
            result = evaluate(
                self.engine,
                self.plan.val_blocks,
                self.token_bytes,
                micro_batch=self.plan.batch.micro_batch,
                sequence_parallel_size=self.plan.batch.sequence_parallel_size,
            )
        metrics = {
            "loss/val": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "seconds/eval": self.watch.spent("eval"),
        }
        self.monitor.log(state, metrics)
        stopper = after_evaluation(state.stopper, result.loss, state.step, self.cfg.early_stopping)
        return replace(state, val_loss=result.loss, stopper=stopper)

    def show_samples(self, state: TrainState) -> None:
        with self.watch.section("sample"), self.watchdog.paused():
            cfg = self.cfg.sample
            texts = complete(self.engine.module, self.plan.tokenizer, cfg.prompts, cfg, until_ended=False)
            self.monitor.text("samples", "\n\n---\n\n".join(texts), state.step)
        self.monitor.log(state, {"seconds/sample": self.watch.spent("sample")})

    def is_new_best(self, state: TrainState) -> bool:
        return self.cfg.early_stopping.restore_best and state.stopper.best_step == state.step

    def save(self, state: TrainState) -> None:
        with self.watch.section("save"), self.watchdog.paused():
            save_checkpoint(
                self.engine,
                state,
                self.plan.train_data.mixture,
                self.plan.identity,
                self.plan.tokenizer,
                self.effective,
                self.writer,
            )
        waited, wrote = self.watch.spent("save"), self.writer.seconds  # to write the save before
        self.monitor.log(state, {"seconds/save": waited} | ({"seconds/write": wrote} if self.cfg.save_async else {}))
        judged = wrote > 0.0 or not self.cfg.save_async  # not before a write has ended
        if judged and not self.warned and (warning := grace_warning(waited, wrote)):
            print_rank0(warning)
            self.warned = True

    def close(self, state: TrainState, reason: str) -> None:
        """Say how the run ended, now that all is saved; after early stopping, put the best weights back."""
        if state.stopper.stopped and self.cfg.early_stopping.restore_best:
            best_dir = step_folder(self.cfg.out_dir, state.stopper.best_step)
            restore(self.engine, best_dir, self.plan.identity, self.effective)
        self.monitor.close()
        gc.unfreeze()
        say_ending(self.cfg, state, reason)

    def _documents(self, step: int, r: int) -> str:
        """Where the first documents came from that a step had on rank r."""
        batch, samples = self.plan.batch, self.plan.train_data.mixture.samples_of(step)
        share = batch.global_batch // batch.replicas
        begin = r // batch.sequence_parallel_size * share
        return documents_of(self.plan.train_data, samples[begin : begin + share], self.cfg.out_dir, step)

    def _speed(self, tokens_per_sec: float) -> dict[str, float]:
        """Throughput over all ranks without evaluating and saving; MFU and HFU where the device's peak is known."""
        speed = {"tokens_per_sec": tokens_per_sec, "memory_gib": peak_memory(self.device) / 2**30}
        known = self.device.type == "cuda" and self.plan.run.deepspeed.dtype != "fp32"  # the peaks are of 16 bit
        if known and (peak := peak_flops(torch.cuda.get_device_name(self.device))) is not None:
            model = self.cfg.model.model_copy(update={"seq_len": self.cfg.seq_len})  # attention costs what is trained
            share = tokens_per_sec / (peak * world_size())
            again = recompute_flops_per_token(
                model,
                self.cfg.recompute,
                dropout=self.cfg.regularization.dropout,
                zero3=self.plan.run.deepspeed.zero_optimization.stage == 3,
                compiled=self.compiled,
            )
            flops = flops_per_token(model, self.plan.vocab_size)
            speed |= {"mfu": flops * share} | ({} if again is None else {"hfu": (flops + again) * share})
        return speed


def _opening(plan: RunSetup, effective: dict[str, Any]) -> str:
    cfg, batch = plan.run.megagpt, plan.batch
    tokens = [f"{dataset.variants('train')[0].tokens:,}" for dataset in plan.train_data.datasets]
    lines = [
        f"{cfg.out_dir}: {cfg.model.n_layer} layers, {cfg.model.n_embd} wide, vocabulary {plan.vocab_size:,}; "
        f"{' + '.join(tokens)} training tokens; global batch {batch.global_batch} = micro-batch {batch.micro_batch} "
        f"x accumulation {batch.accumulation} x {batch.replicas} "
        + ("ranks" if batch.sequence_parallel_size == 1 else f"groups of {batch.sequence_parallel_size} ranks")
    ]
    lines += plan.train_data.packing()
    if plan.saved is None:
        lines.append("no checkpoint was ever committed here: starting at step 0")
    else:
        lines.append(f"going on from {plan.saved.step_dir}")
        lines += [f"  changed: {line}" for line in changed_keys(plan.saved.step_dir, effective)]
        if plan.train_data.mixture.segments != plan.saved.mixture.segments:
            lines.append(
                f"  samples from now on: {plan.train_data.describe(plan.saved.state.samples_seen, cfg.seq_len)}"
            )
    return "\n".join(lines)
