"""Scenarios for two real gloo ranks, started once by the `two_ranks` fixture: starting processes is what costs.

Each function returns, on every rank, what its test in test_two_ranks.py judges.
"""

import hashlib
import io
import os
import resource
import signal
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from resume_matrix import COVERING, what_a_cut_changes, without_generators
from support import EMA, LR_SCALE, MUON, OTHER_BLOCKS, curves, debug_run, metric, read_json, run_scenarios
from task_files import write_tasks

from megagpt.checkpoint import save
from megagpt.checkpoint.commit import best, committed
from megagpt.config.run_file import RunConfig
from megagpt.data.loader import open_data
from megagpt.data.training_set import TrainingSet
from megagpt.distributed.collectives import StopVote, gather_objects
from megagpt.distributed.process_group import init_process_group, rank
from megagpt.engine.build import Engine
from megagpt.engine.state_files import consolidated_weights
from megagpt.errors import UserError
from megagpt.evaluation.scoring import over_ranks
from megagpt.guards import stragglers as pace
from megagpt.model.gpt import GPT
from megagpt.train import session, trainer
from megagpt.train.evaluate import evaluate
from megagpt.train_state import TrainState

DEVICE = init_process_group()


def train(dataset: Path, out_dir: Path, *more: str) -> TrainState:
    return trainer.train(debug_run(dataset, out_dir, *more), DEVICE)


def losses_of_every_stage(dataset: Path, folder: Path) -> dict[str, dict[int, float]]:
    small_buckets = "zero_optimization.reduce_bucket_size=1000"  # smaller than most parameters
    for stage in range(4):
        train(dataset, folder / f"stage{stage}", f"zero_optimization.stage={stage}", "megagpt.noise_scale=true")
        # Below stage 3 this is not the default; there it takes two buckets in turn.
        overlap = ["zero_optimization.overlap_comm=true"] if stage in (1, 2) else []
        train(dataset, folder / f"bucket{stage}", f"zero_optimization.stage={stage}", small_buckets, *overlap)
        train(dataset, folder / f"other blocks{stage}", f"zero_optimization.stage={stage}", *OTHER_BLOCKS, LR_SCALE)
    train(dataset, folder / "offload", "zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=cpu")
    return {run.name: metric(run, "train/loss") for run in sorted(folder.iterdir())}


def muon_at_every_stage(dataset: Path, folder: Path) -> dict[str, dict[int, float]]:
    """With averages; also cut, for the test to continue on one rank. What was in memory is no number: NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for stage in range(4):
            train(dataset, folder / f"stage{stage}", f"zero_optimization.stage={stage}", *MUON, EMA)
        in_turn = "zero_optimization.round_robin_gradients=true"  # parameters lie in another order
        for name, options in {
            "cut": ["zero_optimization.stage=3"],
            "in turn": ["zero_optimization.stage=2", in_turn],
        }.items():
            trainer.train(debug_run(dataset, folder / name, *options, *MUON, EMA), DEVICE, stop_at=10)
    finally:
        torch.use_deterministic_algorithms(False)
    return {run.name: metric(run, "train/loss") for run in sorted(folder.iterdir())}


def stopped_by_a_signal_to_one_rank(dataset: Path, folder: Path) -> dict[str, Any]:
    """Straight, and cut at a step when only rank 1 gets SIGTERM; with dropout, recompute and accumulation."""
    found = {}
    for stage in (1, 3):
        options = [
            f"zero_optimization.stage={stage}",
            "megagpt.regularization.dropout=0.1",
            'megagpt.recompute={"policy": "every_k", "k": 2}',
            "train_micro_batch_size_per_gpu=2",
            "megagpt.schedule.warmup_steps=10",
        ]
        straight = train(dataset, folder / f"straight{stage}", *options)
        with stopped_after(7):
            cut = train(dataset, folder / f"cut{stage}", *options)
        resumed = train(dataset, folder / f"cut{stage}", *options)
        found[f"stage{stage}"] = {
            "cut_at": cut.step,
            "states": [asdict(straight), asdict(resumed)],
            "losses": [metric(folder / f"{run}{stage}", "train/loss") for run in ("straight", "cut")],
            "weights": [digest(newest_weights(folder / f"{run}{stage}")) for run in ("straight", "cut")],
        }
    return found


def straight_and_cut(dataset: Path, folder: Path) -> dict[str, dict[str, Any]]:
    found = {str(case): what_a_cut_changes(case, dataset, folder, DEVICE) for case in COVERING}
    with without_generators():
        found["control"] = what_a_cut_changes(COVERING[6], dataset, folder, DEVICE)
    return found


def weights_of_another_run(dataset: Path, folder: Path) -> dict[str, float]:
    """The largest difference of a weight from the run that it began with, after a step without a rate."""
    once = ["megagpt.schedule.max_steps=1", "megagpt.schedule.warmup_steps=0"]
    train(dataset, folder / "first", *once, "optimizer.params.lr=0.01")
    given, found = newest_weights(folder / "first"), {}
    for stage in range(4):
        out_dir = folder / f"stage{stage}"
        more = [f"megagpt.init_from={folder / 'first'}", f"zero_optimization.stage={stage}", "megagpt.seed=7"]
        train(dataset, out_dir, *once, "optimizer.params.lr=1e-12", *more)
        weights = newest_weights(out_dir)
        found[f"stage{stage}"] = max((weights[name] - given[name]).abs().max().item() for name in given)
    return found


def weights_made_by_transformers(dataset: Path, folder: Path) -> dict[str, dict[int, float]]:
    """Twenty steps that begin with an imported model, which the test has made."""
    made = dataset.parent / "imported"
    shape = [f"megagpt.model.{name}={value}" for name, value in read_json(made / "shape.json").items()]
    for stage in (0, 3):
        more = [f"megagpt.init_from={made / 'model'}", f"zero_optimization.stage={stage}", *shape]
        train(made / "data", folder / f"stage{stage}", *more)
    return {run.name: metric(run, "train/loss") for run in sorted(folder.iterdir())}


OVERFIT = [
    "zero_optimization.stage=1",
    "optimizer.params.lr=0.001",
    "optimizer.params.weight_decay=0.0",
    "megagpt.data.val_tokens=null",
    "megagpt.schedule.max_steps=1000",
    "megagpt.schedule.shape=constant",
    'megagpt.every={"log": 20, "eval": 20, "save": 100}',
    'megagpt.early_stopping={"patience": 12, "min_delta": 0.001, "smoothing": 3, "max_gap": 100}',
]


def overfitting(dataset: Path, folder: Path) -> dict[str, Any]:
    """Nothing to learn but the training text: the run must end by itself, the best weights back in the engine."""
    noise = dataset.parent / "noise"
    engines: list[Engine] = []
    with keeping_the_engine(engines):
        state = train(noise, folder / "whole", *OVERFIT)
    best_dir = best(folder / "whole")
    assert best_dir is not None
    in_memory = {name: p.detach() for name, p in engines[0].module.state_dict().items()}
    middle_of_patience = state.step - 90
    with after_step(middle_of_patience, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
        cut = train(noise, folder / "cut", *OVERFIT)
    resumed = train(noise, folder / "cut", *OVERFIT)
    return {
        "state": asdict(state),
        "cut": asdict(cut),
        "resumed": asdict(resumed),
        "val": metric(folder / "whole", "val/loss"),
        "train": metric(folder / "whole", "train/loss"),
        "best_step": best_dir.name,
        "weights": [digest(in_memory), digest(consolidated_weights(best_dir))],
        "again": asdict(train(noise, folder / "whole", *OVERFIT)),
    }


def a_full_disk_on_one_rank(dataset: Path, folder: Path) -> dict[str, Any]:
    """From step 8 on rank 1 can write no file of 20,000 bytes; its share of the save of step 10 is larger."""
    found = {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for way in ("false", "true"):
        options = [f"megagpt.save_async={way}", "megagpt.every.save=5", "megagpt.every.sample=0"]
        try:
            with after_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if rank() else soft, hard))):
                train(dataset, folder / way, *options)
        except UserError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = [path.name for path in committed(folder / way)]
        found[way] = {"message": message, "left": left, "then": train(dataset, folder / way, *options).step}
    return found


def a_signal_during_a_save(dataset: Path, folder: Path) -> dict[str, Any]:
    """Written beside training, the save of step 5 cannot end before rank 1 has got its signal after step 7."""
    signaled, original = threading.Event(), save.write_files

    def waiting(*args: Any) -> None:
        signaled.wait()
        original(*args)

    def tell() -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        found["while in flight"] = [path.name for path in committed(folder / "run")]
        signaled.set()

    found: dict[str, Any] = {}
    save.write_files = waiting
    options = ["megagpt.save_async=true", "megagpt.every.save=5", "megagpt.every.sample=0"]
    try:
        with after_step(7, tell):
            found["stopped at"] = train(dataset, folder / "run", *options).step
    finally:
        save.write_files = original
    found["committed"] = [path.name for path in committed(folder / "run")]
    found["then"] = train(dataset, folder / "run", *options).step
    return found


def tasks_while_training(dataset: Path, folder: Path) -> dict[str, dict[int, float]]:
    """At stage 3, stopped after the first run of the tasks and resumed; more ranks than the last batch has rows."""
    if find_spec("lm_eval") is None:
        return {}
    tasks = folder.parent / "tasks"
    if rank() == 0:
        write_tasks(tasks, dataset.with_suffix(".jsonl"), documents=9)
    gather_objects(None)
    options = ["zero_optimization.stage=3", "megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0"]
    options += ['megagpt.every={"log": 2, "save": 2, "tasks": 2}', f'megagpt.tasks=["{tasks}"]']
    for stop_at in (2, None):
        trainer.train(debug_run(dataset, folder / "run", *options), DEVICE, stop_at=stop_at)
    return {name: curve for name, curve in curves(folder / "run").items() if name.startswith("tasks/")}


def batches_over_ranks(dataset: Path, folder: Path) -> list[list[int]]:
    """What came of each of five batches: its number, and the rank that ran it."""
    return over_ranks(range(5), lambda number: [number, rank()])


def a_mistake_that_one_rank_alone_sees(dataset: Path, folder: Path) -> str:
    try:
        with session.errors_on_every_rank():
            if rank() == 1:
                raise UserError("no such file")
    except UserError as error:
        return str(error)
    return "nothing raised"


def validation_loss(dataset: Path, folder: Path) -> list[dict[str, float]]:
    """Five windows over two ranks, micro-batch 2: the second rank gets fewer windows than it has rows.

    And one window: the second rank has none.
    """
    found = []
    for tokens in (320, 64):
        run = debug_run(dataset, folder, f"megagpt.data.val_tokens={tokens}")
        found.append(_validation_loss(run))
    return found


def _validation_loss(run: RunConfig) -> dict[str, float]:
    sets, datasets = open_data(run.megagpt.data, run.megagpt.model.seq_len)
    torch.manual_seed(0)
    model = GPT(run.megagpt.model, 384)
    token_bytes = torch.from_numpy(datasets[0].tokenizer().token_bytes())
    return asdict(evaluate(model, sets[""].windows, token_bytes, micro_batch=2))


def a_rank_late_with_its_data(dataset: Path, folder: Path) -> str:
    """What is said until rank 1, which reads its data slowly, is named; windows of a second, to be named sooner."""
    options = ["megagpt.schedule.max_steps=1000", 'megagpt.every={"log": 5, "eval": 0, "save": 0}']
    fill, seconds = TrainingSet.fill, pace.WINDOW_SECONDS

    def slow_fill(*args: Any) -> None:
        time.sleep(0.1 if rank() == 1 else 0.0)
        fill(*args)

    TrainingSet.fill, pace.WINDOW_SECONDS = slow_fill, 1.0
    try:
        with redirect_stdout(UntilNamed()) as said:
            train(dataset, folder, *options)
    finally:
        TrainingSet.fill, pace.WINDOW_SECONDS = fill, seconds
    return said.getvalue()


class UntilNamed(io.StringIO):
    """Asks for the run's end once a rank was named."""

    def write(self, text: str) -> int:
        if "straggler: rank" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def votes(dataset: Path, folder: Path) -> list[bool]:
    """Rank 1 alone asks to stop at the third boundary."""
    vote = StopVote()
    return [vote(rank() == 1 and boundary == 2) for boundary in range(6)]


class after_step:
    """Do something on this rank when a step has been taken, before the vote on stopping is cast."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action, self.original = step, action, trainer.train_step

    def __enter__(self) -> None:
        taken = 0

        def counted(*args: Any) -> Any:
            nonlocal taken
            result = self.original(*args)
            taken += 1
            if taken == self.step:
                self.action()
            return result

        trainer.train_step = counted

    def __exit__(self, *_: object) -> None:
        trainer.train_step = self.original


def stopped_after(step: int) -> after_step:
    """As by a scheduler that tells rank 1 alone."""
    return after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank() == 1 else None)


class keeping_the_engine:
    def __init__(self, engines: list[Engine]) -> None:
        self.engines, self.original = engines, session.build_engine

    def __enter__(self) -> None:
        def build(*args: Any, **kw: Any) -> Engine:
            self.engines.append(self.original(*args, **kw))
            return self.engines[-1]

        session.build_engine = build

    def __exit__(self, *_: object) -> None:
        session.build_engine = self.original


def newest_weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return consolidated_weights(committed(out_dir)[-1])


def digest(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over all bytes of all weights."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode() + weights[name].contiguous().float().numpy().tobytes())
    return whole.hexdigest()


SCENARIOS = [
    losses_of_every_stage,
    muon_at_every_stage,
    stopped_by_a_signal_to_one_rank,
    straight_and_cut,
    weights_of_another_run,
    weights_made_by_transformers,
    overfitting,
    a_full_disk_on_one_rank,
    a_signal_during_a_save,
    tasks_while_training,
    batches_over_ranks,
    a_mistake_that_one_rank_alone_sees,
    validation_loss,
    a_rank_late_with_its_data,
    votes,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
