"""Check everything that can be checked before a GPU is used: run file against ranks, data, tokenizer, checkpoint."""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.commit import Saved, committed
from megagpt.checkpoint.identity import check_identity, identity_of, layout_changes
from megagpt.checkpoint.named_step import check_is_no_step, starting_step
from megagpt.checkpoint.run_samples import next_samples
from megagpt.checkpoint.save import RunRecord
from megagpt.checkpoint.verification import newest_verified
from megagpt.config.batch import BatchPlan, batch_plan, check_first_batch, rank_numbers
from megagpt.config.run_file import RunConfig
from megagpt.config.schedule import ScheduleConfig
from megagpt.config.schema import MegaGPTConfig
from megagpt.data.augmentation import batch_transform
from megagpt.data.dataset import Dataset
from megagpt.data.loader import ValidationSet, open_data
from megagpt.data.loss_mask import BatchTransform
from megagpt.data.packing import PACKING
from megagpt.data.training_set import TrainingSet
from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.process_group import world_size
from megagpt.distributed.rank_variables import OURS
from megagpt.distributed.rendezvous import check_equal_on_ranks
from megagpt.engine.compilation import compiles
from megagpt.engine.deepspeed_config import effective_config
from megagpt.errors import UserError
from megagpt.evaluation.tasks import Tasks, open_tasks
from megagpt.guards.spikes import check_skipping
from megagpt.tokenizer.tokenizer import Tokenizer, padded_vocab_size
from megagpt.train.early_stopping import at_resume
from megagpt.train.lr_schedule import decay_in_the_past, other_tokens_so_far
from megagpt.train_state import TrainState


@dataclass(frozen=True)
class OpenedData:
    """The opened datasets of a run, with tokenizer and batch transform."""

    train: list[Dataset]
    val: dict[str, ValidationSet]  # by their names in the run file
    tokenizer: Tokenizer
    vocab_size: int  # padded
    transform: BatchTransform | None  # augmentation and loss mask of the training rows

    @property
    def folders(self) -> list[Path]:
        """The folders of all datasets."""
        return [dataset.path for dataset in (*self.train, *(one.dataset for one in self.val.values()))]


@dataclass(frozen=True)
class RunSetup:
    """A checked run: run file, data and checkpoint, before anything is built."""

    run: RunConfig
    batch: BatchPlan
    compiled: bool  # the blocks are compiled
    data: OpenedData
    training_set: TrainingSet
    deepspeed_config: dict[str, Any]  # what DeepSpeed gets
    record: RunRecord
    saved: Saved | None  # the step to resume from
    start: Path | None = None  # the step of another run that a new run takes its weights from
    tasks: Tasks | None = None  # of lm-evaluation-harness

    @property
    def state(self) -> TrainState:
        """The state to resume from, or that of step 0."""
        if self.saved is None:
            return TrainState()
        state = self.saved.state
        return replace(state, stopper=at_resume(state.stopper, self.run.megagpt.early_stopping))


def prepare(run: RunConfig, device: torch.device, *, fresh: bool) -> RunSetup:
    """Check everything that a user may have got wrong. `fresh`: start at step 0, whatever out_dir holds.

    Collective; raises UserError on every rank.
    """
    cfg = run.megagpt
    check_skipping(run, device)
    compiled = compiles(cfg.compile, device)
    batch = batch_plan(run.deepspeed, world_size(), _fewer_ranks())
    with errors_on_every_rank():
        check_is_no_step(cfg.out_dir)
        data = _open_data(cfg)
        tasks = _open_tasks(cfg)
    val = {name: one.dataset for name, one in data.val.items()}
    fingerprints = {f"{dataset.path} (fingerprint)": dataset.fingerprint for dataset in (*data.train, *val.values())}
    fingerprints |= {f"task {name}": documents for name, documents in (tasks.fingerprints() if tasks else {}).items()}
    check_equal_on_ranks(fingerprints, "let all hosts see the same dataset, or copies of it")
    identity = identity_of(run, batch, data.vocab_size, val)
    config = effective_config(run, batch, data.vocab_size, device)
    record = RunRecord(cfg.out_dir, cfg.keep, identity, data.tokenizer, {**run.as_json(), **config})
    saved = None if fresh else newest_verified(cfg.out_dir)
    check_first_batch(cfg.schedule, batch, saved.state.step if saved else 0)
    check_noise_scale(cfg, batch, saved.state.step if saved else 0)
    if saved is not None:
        check_identity(saved.step_dir, saved.identity, identity)
        layout_changes(saved.step_dir, saved.identity, identity, record.effective)  # refuses what cannot be resharded
        if wrong := decay_in_the_past(
            json.loads((saved.step_dir / "run.json").read_bytes()), saved.state.step, cfg.schedule
        ):
            raise UserError(wrong)
        if wrong := other_tokens_so_far(saved.state, cfg.schedule, batch.global_batch, cfg.seq_len):
            raise UserError(wrong)
    with errors_on_every_rank():
        start = None
        if cfg.init_from and saved is None:
            start = starting_step(cfg.init_from, identity.model, identity.tokenizer)
        training_set = next_samples(cfg, batch.global_batch, saved, data.train)
        if saved and (wrong := other_epochs_so_far(training_set, saved.state, batch.global_batch, cfg.schedule)):
            raise UserError(wrong)
        training_set.open_all()  # a damaged shard is found here, and not in the middle of the run
    return RunSetup(run, batch, compiled, data, training_set, config, record, saved, start, tasks)


def check_noise_scale(cfg: MegaGPTConfig, batch: BatchPlan, step: int) -> None:
    """Raise UserError where a step after `step` has one micro-batch, whose gradient can be compared with no other."""
    smallest = cfg.schedule.batches(batch.global_batch).at(step)
    if cfg.noise_scale and batch.micro_batch == smallest:
        half, whole = batch.micro_batch // 2, "train_batch_size"
        if smallest < batch.global_batch:
            whole = f"the batch that megagpt.schedule.first_batch makes in step {step + 1}"
        way_out = f"set train_micro_batch_size_per_gpu to {half}" if batch.micro_batch % 2 == 0 else "raise the latter"
        raise UserError(
            "megagpt.noise_scale=true compares micro-batches with the global batch, and "
            f"train_micro_batch_size_per_gpu={batch.micro_batch} is all of {whole}; {way_out}, or remove "
            "megagpt.noise_scale"
        )


def other_epochs_so_far(
    training_set: TrainingSet, state: TrainState, global_batch: int, cfg: ScheduleConfig
) -> str | None:
    """Return what is wrong if the steps so far had other data, batches or lengths, so that max_epochs is missed."""
    mixture, batches = training_set.mixture, cfg.batches(global_batch)
    as_planned = all(batches.at(one.first_step) == one.global_batch for one in mixture.batches) and all(
        len(mixture.samples_of(first + 1)) == n for first, n in batches.stages
    )
    if cfg.max_epochs is None or (len(mixture.segments) == 1 and as_planned):
        return None
    wanted = cfg.max_epochs - 1e-12  # what the sampler counts is a float

    def read(more_steps: int) -> bool:
        more = batches.total(state.step + more_steps) - batches.total(state.step)
        return training_set.epochs(state.samples_seen + more)[0] >= wanted

    most = 1
    while not read(most):
        most *= 2
    steps = state.step + bisect_left(range(most), True, key=read)
    if steps == max(state.step, cfg.max_steps):
        return None
    return (
        f"megagpt.schedule.max_epochs={cfg.max_epochs:g} makes {cfg.max_steps} steps of this data and batch, and the "
        f"{state.step} steps so far had others; to read this data {cfg.max_epochs:g} times in all, set "
        f"megagpt.schedule.max_epochs=null megagpt.schedule.max_steps={steps}"
    )


def refused_data(run: RunConfig) -> UserError | None:
    """Return why a new run would refuse its data on this machine, or None; packs no rows, which can take minutes."""
    cfg = run.megagpt
    try:
        data = _open_data(cfg)
        if PACKING[cfg.packing.kind].plan_rows is None:
            next_samples(cfg, run.deepspeed.train_batch_size, None, data.train)
    except UserError as error:
        return error
    return None


def refused_start(run: RunConfig) -> str | None:
    """Return why a new run would refuse the weights that megagpt.init_from names on this machine, or None.

    The files of the weights are not read, and a run that resumes needs none.
    """
    cfg = run.megagpt
    if cfg.init_from is None or committed(cfg.out_dir):
        return None
    tokenizer = None
    with suppress(UserError):  # which `refused_data` returns
        tokenizer = _open_data(cfg).tokenizer.sha256
    try:
        starting_step(cfg.init_from, cfg.model.identity(), tokenizer)
    except UserError as error:
        return str(error)
    return None


def refused_tasks(cfg: MegaGPTConfig) -> str | None:
    """Return why a run would refuse its tasks on this machine, or None."""
    try:
        _open_tasks(cfg)
    except UserError as error:
        return str(error)
    return None


def _fewer_ranks() -> Iterator[tuple[int, str]] | None:
    """Return the ways to start fewer ranks by `megagpt train`; None below another launcher."""
    return rank_numbers(world_size(), "give --nproc {}") if OURS in os.environ else None


def _open_tasks(cfg: MegaGPTConfig) -> Tasks | None:
    return open_tasks(cfg.tasks, "megagpt.tasks: ") if cfg.every.tasks else None


def _open_data(cfg: MegaGPTConfig) -> OpenedData:
    val, train = open_data(cfg.data, cfg.model.seq_len, masked=PACKING[cfg.packing.kind].masked)
    tokenizer = train[0].tokenizer()
    vocab_size = padded_vocab_size(tokenizer.vocab_size)
    transform = batch_transform(cfg.augment, cfg.packing, tokenizer, vocab_size, cfg.data.seed)
    return OpenedData(train, val, tokenizer, vocab_size, transform)
