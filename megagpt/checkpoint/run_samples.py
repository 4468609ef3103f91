"""The samples of a run, from its folder alone: what each step read. Imports no torch, so that it starts fast."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from megagpt.checkpoint.commit import Saved, newest_record
from megagpt.config.schema import MegaGPTConfig
from megagpt.data.dataset import Dataset
from megagpt.data.mixture import Mixture
from megagpt.data.training_set import TrainingSet, earlier_datasets, open_datasets, plan_mixture, row_opener, source_of
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
    """Open all samples, past and future, of a run at a saved step, or of one that has not begun. Raises UserError."""
    return samples_of(cfg, global_batch, saved, open_datasets([d.path for d in cfg.data.train]), with_earlier=True)


def samples_of(
    cfg: MegaGPTConfig,
    global_batch: int,
    saved: Saved | None,
    datasets: Sequence[Dataset],
    *,
    with_earlier: bool = False,
) -> TrainingSet:
    """Return the samples of a run on its open `datasets`, from its saved step on; raises UserError.

    `with_earlier`: also open datasets that the run has left since, in which its past samples lie.
    """
    open_rows = row_opener(cfg)
    sources = [source_of(d, open_rows) for d in datasets]
    history, state = (saved.mixture, saved.state) if saved else (Mixture(cfg.data.seed), TrainState())
    mixture = plan_mixture(cfg, global_batch, sources, history, step=state.step, sample=state.samples_seen)
    earlier = earlier_datasets(mixture, datasets) if with_earlier else []
    return TrainingSet(mixture, datasets, earlier=earlier, open_variant=open_rows)
