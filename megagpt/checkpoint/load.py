"""Load a committed step: resume a run from it, restore its weights, or open its model alone."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from megagpt.checkpoint.commit import COMMIT, Saved, damage_of, read_commit
from megagpt.checkpoint.finite import not_finite
from megagpt.checkpoint.identity import layout_changes
from megagpt.checkpoint.named_step import step_of
from megagpt.checkpoint.rng import seed_all, seed_from, set_rng_state
from megagpt.checkpoint.rotation import quarantine_steps
from megagpt.checkpoint.save import RunRecord
from megagpt.checkpoint.verification import find_damage
from megagpt.config.augmentation import PackingConfig
from megagpt.config.model import ModelConfig
from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.process_group import is_main, print_rank0, rank, world_size
from megagpt.engine.build import Engine
from megagpt.engine.ema import drop_averages, has_averages
from megagpt.engine.optimizer import decay_groups
from megagpt.engine.reshard import SavedShape, load_reshaped, saved_averages
from megagpt.engine.state_files import consolidated_weights, load_engine
from megagpt.errors import UserError, writing_to
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer


def resume(engine: Engine, saved: Saved, record: RunRecord, seed: int) -> None:
    """Load weights, moments and this rank's RNG state. Collective.

    `record` is of the run that resumes. With another number of ranks the generators are reseeded.
    """
    _load(engine, saved, record)
    if saved.identity.world_size == world_size():
        set_rng_state(json.loads((saved.step_dir / f"rng.{rank()}.json").read_bytes()))
    else:
        print_rank0("  RNG state not restored (other number of ranks): reseeded from (megagpt.seed, step, rank)")
        seed_all(seed_from(seed, saved.state.step, rank()))
    with errors_on_every_rank(), writing_to(saved.step_dir.parents[1]):
        if is_main():
            quarantine_steps(list(saved.passed_over))


def restore(engine: Engine, step_dir: Path, record: RunRecord) -> None:
    """Load the weights of a step that this run saved, if it is undamaged. Collective."""
    damage = find_damage(step_dir)
    if damage is None:
        _load(engine, read_commit(step_dir), record)
    else:
        print_rank0(f"checkpoint {step_dir} is damaged ({damage}); the run keeps its last weights instead of its best")


def _load(engine: Engine, saved: Saved, record: RunRecord) -> None:
    if changes := layout_changes(saved.step_dir, saved.identity, record.identity, record.effective):
        print_rank0(f"resharding weights and optimizer state of checkpoint {saved.step_dir} ({', '.join(changes)})")
        was, state = saved.identity, saved.state
        load_reshaped(
            engine,
            saved.step_dir,
            SavedShape(was.world_size, was.zero_stage, was.dtype),
            weight_decay_on=was.weight_decay_on,
            step=state.step,
            samples_seen=state.samples_seen,
        )
    else:
        load_engine(engine, saved.step_dir)
    wanted = record.effective["megagpt"]["ema"]["decay"] is not None
    if wanted and not has_averages(engine):
        print_rank0(f"checkpoint {saved.step_dir} has no averaged weights: the average begins with its weights")
    elif not wanted:
        drop_averages(engine)


TRIES = 20  # to read a step before its run deletes it


class LoadedModel(NamedTuple):
    """A model (fp32, eval mode), and what else its step's folder says."""

    model: GPT
    tokenizer: Tokenizer
    step_dir: Path
    packing: PackingConfig


def load_model(path: Path, device: torch.device, *, ema: bool = False) -> LoadedModel:
    """Load the model of a run's folder (its best step), of one step's or of a pointer, also while the run trains.

    `ema`: with the averaged weights. Raises UserError for a folder without a committed step, for one that is damaged
    or not finite, and for a step without averages.
    """
    for _ in range(TRIES):
        step_dir = step_of(path)
        try:
            return _load_step(step_dir, device, ema=ema)
        except Exception:  # DeepSpeed and torch raise many kinds for a file that is missing
            if (step_dir / COMMIT).is_file():
                raise
            # The run has deleted this step meanwhile, and has committed newer ones.
    raise UserError(
        f"{path} trains, and has deleted {TRIES} steps while they were read, the last {step_dir.name}; give its best "
        "step, which stays longer, or raise megagpt.keep.last"
    )


def _load_step(step_dir: Path, device: torch.device, *, ema: bool) -> LoadedModel:
    weights = finite_weights(step_dir)
    saved = read_commit(step_dir)
    tokenizer = Tokenizer.load(step_dir / "tokenizer.model")
    with torch.device("meta"):  # no weights are drawn only to be replaced, and memory holds the weights once
        model = GPT(ModelConfig(**saved.identity.model), saved.identity.vocab_size)
    if ema:
        _average(weights, model, saved)
    model.load_state_dict(weights, assign=True)
    model.tie_output()
    return LoadedModel(model.to(device).eval(), tokenizer, step_dir, packing_of(step_dir))


@torch.no_grad()
def _average(weights: dict[str, torch.Tensor], model: GPT, saved: Saved) -> None:
    """Replace a step's weights by their averages, in place: tied ones share memory. `model` has its parameters."""
    was = saved.identity
    momentum = 0.0 if was.optimizer == "Muon" else None
    scale: dict[str, float] | None = {} if was.lr_scale else None
    groups = decay_groups(model, 0.0, was.weight_decay_on, momentum=momentum, lr_scale=scale)
    names = {p: name for name, p in model.named_parameters()}
    sizes = {names[p]: p.numel() for group in groups for p in group["params"]}
    averages = saved_averages(saved.step_dir, SavedShape(was.world_size, was.zero_stage, was.dtype), sizes)
    if not averages:
        raise UserError(
            f"checkpoint {saved.step_dir} has no averaged weights: its run was without megagpt.ema.decay; leave out "
            "--ema, or in Python ema=True"
        )
    for name, average in averages.items():
        weights[name].view(-1).copy_(average)


def finite_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a committed step, in fp32. Raises UserError if they are damaged or not finite."""
    if damage := damage_of(step_dir, 0, every=1):
        raise UserError(f"{damage}; restore the file or name another step")
    weights = consolidated_weights(step_dir)
    if name := not_finite(weights):
        raise UserError(f"checkpoint {step_dir} is not finite ({name}), so its model is of no use; name another step")
    return weights


def starting_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """Return a step's weights on rank 0, and none on the others. Collective; raises UserError on every rank."""
    with errors_on_every_rank():
        return finite_weights(step_dir) if is_main() else {}


def packing_of(step_dir: Path) -> PackingConfig:
    """Return how a step's run packed its documents: evaluation must mask attention alike."""
    section = json.loads((step_dir / "run.json").read_bytes())["megagpt"]
    return PackingConfig(**section.get("packing", {}))  # a step of an older megagpt has none
