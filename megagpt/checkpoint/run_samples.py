"""The samples of a run, from its folder alone: what each step read. Imports no torch, so that it starts fast."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from megagpt.checkpoint.commit import Saved, newest_record
from megagpt.config.schema import MegaGPTConfig
from megagpt.data.dataset import Dataset
from megagpt.data.mixture import Mixture
from megagpt.data.packing import PACKING
from megagpt.data.training_set import OpenVariant, TrainingSet, earlier_datasets, open_datasets, row_opener, source_of
from megagpt.errors import UserError
from megagpt.train_state import TrainState


def open_run(out_dir: Path) -> TrainingSet:
    """Open the samples that a run has drawn and would draw next, from its folder alone.

    Raises UserError if it is no run folder, or if its datasets are missing.
    """
    file = out_dir / "run.json"
    try:
        raw = json.loads(file.read_bytes())
        cfg, global_batch = MegaGPTConfig.model_validate(raw["megagpt"]), int(raw["train_batch_size"])
    except FileNotFoundError:
        raise UserError(f"{out_dir} is not the folder of a run: it has no run.json") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{file} is damaged or of another version: {error}") from error
    return open_samples(cfg, global_batch, newest_record(out_dir))


def open_samples(cfg: MegaGPTConfig, global_batch: int, saved: Saved | None) -> TrainingSet:
    """Open all samples of a run at a saved step, or of one that has not begun. Raises UserError.

    Past ones may lie in datasets that the run has left since.
    """
    datasets = open_datasets([d.path for d in cfg.data.train])
    mixture, open_rows = _mixture(cfg, global_batch, saved, datasets)
    return TrainingSet(mixture, datasets, earlier=earlier_datasets(mixture, datasets), open_variant=open_rows)


def next_samples(
    cfg: MegaGPTConfig, global_batch: int, saved: Saved | None, datasets: Sequence[Dataset]
) -> TrainingSet:
    """Return the samples of a run on its open `datasets` from its saved step on; raises UserError."""
    mixture, open_rows = _mixture(cfg, global_batch, saved, datasets)
    return TrainingSet(mixture, datasets, open_variant=open_rows)


def _mixture(
    cfg: MegaGPTConfig, global_batch: int, saved: Saved | None, datasets: Sequence[Dataset]
) -> tuple[Mixture, OpenVariant]:
    """Return the mixture of a new or resumed run, and how it reads a variant of its `datasets`, those of data.train."""
    open_rows = row_opener(cfg)
    history, state = (saved.mixture, saved.state) if saved else (Mixture(cfg.data.seed), TrainState())
    batches = cfg.schedule.batches(global_batch)
    mixture = history.continued(
        [(source_of(d, open_rows), entry.weight) for d, entry in zip(datasets, cfg.data.train, strict=True)],
        step=state.step,
        sample=state.samples_seen,
        seq_len=PACKING[cfg.packing.kind].window(cfg.seq_len),
        global_batch=batches.at(state.step),
        later=[stage for stage in batches.stages if stage[0] > state.step],
    )
    return mixture, open_rows
