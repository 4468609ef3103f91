"""The training loop. Read `run_steps` first; everything that it calls is one hop away, most of it in session.py."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from megagpt.checkpoint.run_lock import RunLock
from megagpt.config.run_file import RunConfig
from megagpt.data.loader import Batch
from megagpt.distributed.collectives import StopVote
from megagpt.distributed.process_group import print_rank0
from megagpt.guards.restarts import is_requeued_start, recorded_start
from megagpt.guards.step_window import StepResult, StepWindow
from megagpt.guards.weight_check import compare_weights
from megagpt.metrics.step_metrics import Pace
from megagpt.metrics.trackers import Outcome
from megagpt.model.loss import kept_share, next_token_score
from megagpt.train.monitor import print_nothing_left
from megagpt.train.preemption import Preemption
from megagpt.train.preflight import prepare
from megagpt.train.run_log import RunLog
from megagpt.train.session import Session
from megagpt.train_state import TrainState


def train(
    run: RunConfig,
    device: torch.device,
    *,
    fresh: bool = False,
    preemption: Preemption | None = None,
    stop_at: int | None = None,
    log: RunLog | None = None,
) -> TrainState:
    """Train until the run is finished, is told to stop, or reaches step `stop_at`; returns the state saved last.

    `log` is opened in the run's folder. Collective. Raises UserError for a wrong run file or dataset, and where a guard
    stops the run.
    """
    preemption = preemption or Preemption()
    preemption.set_time_limit(run.megagpt.time_limit_minutes)
    with RunLock(run.megagpt.out_dir) as lock:
        fresh = fresh and not is_requeued_start(run.megagpt.out_dir)
        setup = prepare(run, device, fresh=fresh)
        if setup.state.finished(run.megagpt.schedule.max_steps):
            print_nothing_left(run.megagpt, setup.state)
            return setup.state
        with (
            lock.archived_run(*setup.data.folders, setup.start) if fresh else nullcontext(),
            recorded_start(run, setup.state.step),
        ):
            session = Session(setup, device, launcher_alive=preemption.launcher_alive, before_save=lock.check)
        outcome: Outcome = "failed"
        try:
            if log is not None:
                log.open(run.megagpt.out_dir)
            state = run_steps(session, preemption, stop_at)
            outcome = "finished" if state.finished(run.megagpt.schedule.max_steps) else "stopped"
            return state
        finally:
            session.monitor.close(outcome)


def run_steps(session: Session, preemption: Preemption, stop_at: int | None) -> TrainState:
    """Train, log, evaluate, sample and save until the run has finished or is told to stop. Collective."""
    setup, run, vote = session.setup, session.setup.run, StopVote()
    state, schedule, every = setup.state, run.megagpt.schedule, run.megagpt.every
    batches, window, stop, owed = session.batches(), StepWindow(), False, False
    pace = Pace(state.step, schedule.max_steps, every.log, schedule.batches(setup.batch.global_batch))

    with session.writer, session.watchdog, vote:
        if setup.start is not None and every.eval:
            session.evaluate_start(state)
        while not (stop or state.finished(schedule.max_steps)):
            session.set_step(state.step)
            window.add(train_step(session, batches))
            state = state.after_step(session.global_batch, run.megagpt.seq_len)
            stop = vote(preemption.requested or session.writer.failed) or state.step == stop_at
            done = state.step == schedule.max_steps
            session.watchdog.beat(state.step, ending=stop or done)
            if line := pace(state.step):
                print_rank0(line)
            if due(state.step, run.megagpt.guards.compare_every):
                compare_weights(session.engine.module.named_parameters(), state.step)

            cadences = (every.log, every.eval, every.save, every.sample, every.tasks)
            if stop or done or owed or any(due(state.step, n) for n in cadences):
                state, roll_back = session.log(state, window)
                window = StepWindow()
                if roll_back:
                    state, batches = session.roll_back(state)
                    continue
            if done or due(state.step, every.eval):
                state = session.evaluate(state)
            if due(state.step, every.sample):
                session.show_samples(state)
            if due(state.step, every.tasks):
                session.run_tasks(state)
            last = stop or state.finished(schedule.max_steps)
            owed = owed or last or due(state.step, every.save)
            if owed or session.is_new_best(state):
                owed = not session.save(state, last=last)

    session.close(state, preemption.reason, saved=not owed)
    return state


def train_step(session: Session, batches: Iterator[Batch]) -> StepResult:
    """Make one optimizer update from this rank's share of a global batch.

    Every target with a loss weighs the same, in whichever micro-batch and on whichever rank: the gradient is that of
    their sum over the number of all targets, ignored ones included. That number is known without asking other ranks.
    The results stay on the device: reading them here would make every step wait for the GPU.
    """
    engine, regularization = session.engine, session.cfg.regularization
    accumulation = engine.gradient_accumulation_steps()
    losses, shares = [], []
    for micro_batch in range(accumulation):
        with session.stopwatch.section("data"):
            batch = next(batches)
        score = next_token_score(
            batch.targets,
            label_smoothing=regularization.label_smoothing,
            z_loss=regularization.z_loss,
            compiled=session.setup.compiled,
        )
        with session.timer.forward():
            loss = engine(batch.inputs, documents=batch.documents, score=score)
        shares.append(kept_share(batch.targets))
        loss = loss * shares[-1]
        engine.backward(loss)  # DeepSpeed divides by gradient_accumulation_steps
        losses.append(loss.detach())
        if micro_batch == accumulation - 1:
            mean_loss, mean_share = torch.stack(losses).mean(), torch.stack(shares).mean()
            session.gate.observe(mean_loss, mean_share)
        engine.step()  # updates the weights on the last micro-batch only
    return StepResult(
        mean_loss, mean_share, engine.get_global_grad_norm(), session.gate.closed, session.micro_batch_norms.take()
    )


def due(step: int, cadence: int) -> bool:
    """Tell whether something done every `cadence` steps falls on this step; never for 0."""
    return cadence > 0 and step % cadence == 0
