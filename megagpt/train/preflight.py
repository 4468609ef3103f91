"""Everything that can be checked before a GPU is used."""

from dataclasses import dataclass

from megagpt.checkpoint.commit import Saved
from megagpt.checkpoint.identity import Identity, check_identity, identity_of
from megagpt.checkpoint.save import archive_run
from megagpt.checkpoint.verification import newest_verified
from megagpt.config.batch import BatchPlan, batch_plan
from megagpt.config.run_file import RunConfig
from megagpt.data.augmentation import rework_of
from megagpt.data.loader import ValBlocks, open_data
from megagpt.data.loss_mask import BatchTransform
from megagpt.data.mixture import Mixture
from megagpt.data.tokenizer import Tokenizer, padded_vocab_size
from megagpt.data.training_set import TrainingSet, plan_mixture, row_opener, source_of
from megagpt.distributed.collectives import on_every_rank
from megagpt.distributed.process_group import world_size
from megagpt.distributed.rendezvous import check_equal_on_ranks
from megagpt.train_state import TrainState


@dataclass(frozen=True)
class RunSetup:
    """A run whose files were all found right, before anything is built; `saved` is the step to resume from."""

    run: RunConfig
    batch: BatchPlan
    train_data: TrainingSet
    rework: BatchTransform | None  # what becomes of its rows
    val_blocks: ValBlocks
    tokenizer: Tokenizer
    vocab_size: int  # padded
    identity: Identity
    saved: Saved | None

    @property
    def state(self) -> TrainState:
        return self.saved.state if self.saved else TrainState()


def prepare(run: RunConfig, *, fresh: bool) -> RunSetup:
    """Everything a user can have got wrong, found before a GPU is used. Collective; raises UserError."""
    cfg = run.megagpt
    batch = batch_plan(run.deepspeed, world_size())
    val_blocks, datasets = on_every_rank(lambda: open_data(cfg.data, cfg.model.seq_len, masked=cfg.packing.masked))
    fingerprints = {f"{dataset.path} (fingerprint)": dataset.fingerprint for dataset in datasets}
    check_equal_on_ranks(fingerprints, "let all hosts see the same dataset, or copies of it")
    tokenizer = on_every_rank(datasets[0].tokenizer)
    vocab_size = padded_vocab_size(tokenizer.vocab_size)
    rework = on_every_rank(lambda: rework_of(cfg.augment, cfg.packing, tokenizer, vocab_size, cfg.data.seed))
    identity = identity_of(run, batch, vocab_size, val=datasets[-1])
    saved = None if fresh else newest_verified(cfg.out_dir)
    if saved is not None:
        check_identity(saved.step_dir, saved.identity, identity)
    open_rows = row_opener(cfg)
    sources = on_every_rank(lambda: [source_of(dataset, open_rows) for dataset in datasets[:-1]])
    history, state = (saved.mixture, saved.state) if saved else (Mixture(cfg.data.seed), TrainState())
    mixture = on_every_rank(
        lambda: plan_mixture(cfg, batch.global_batch, sources, history, step=state.step, sample=state.samples_seen)
    )
    train_data = TrainingSet(mixture, datasets[:-1], open_variant=open_rows)
    on_every_rank(train_data.open_all)
    if fresh:
        archive_run(cfg.out_dir)
    return RunSetup(run, batch, train_data, rework, val_blocks, tokenizer, vocab_size, identity, saved)
