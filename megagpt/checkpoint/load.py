"""Load a committed step: resume a run from it, restore its weights, or open its model alone."""

import json
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.commit import (
    COMMIT,
    Saved,
    best,
    committed,
    damage_of,
    read_commit,
)
from megagpt.checkpoint.identity import Identity, layout_changes
from megagpt.checkpoint.rng import seed_all, seed_from, set_rng_state
from megagpt.checkpoint.rotation import quarantine_steps
from megagpt.checkpoint.verification import find_damage
from megagpt.config.schema import ModelConfig, PackingConfig
from megagpt.data.tokenizer import Tokenizer
from megagpt.distributed.collectives import on_every_rank
from megagpt.distributed.process_group import is_main, print_rank0, rank, world_size
from megagpt.engine.build import Engine
from megagpt.engine.reshard import SavedShape, load_reshaped
from megagpt.engine.state_files import consolidated_weights, load_engine
from megagpt.errors import UserError
from megagpt.model.gpt import GPT


def resume(engine: Engine, saved: Saved, changes: list[str], seed: int) -> None:
    """Load weights, moments and this rank's random generators. Collective.

    `changes`: what identity.reshaped found. Other ranks than those that saved seed their generators anew.
    """
    _load(engine, saved, changes)
    if saved.identity.world_size == world_size():
        set_rng_state(json.loads((saved.step_dir / f"rng.{rank()}.json").read_bytes()))
    else:
        print_rank0("  random generators: seeded anew from (megagpt.seed, step, rank)")
        seed_all(seed_from(seed, saved.state.step, rank()))
    on_every_rank(lambda: quarantine_steps(list(saved.passed_over)) if is_main() else None)


def restore(engine: Engine, step_dir: Path, identity: Identity, effective: dict[str, Any]) -> None:
    """Load the weights of a step that was saved earlier, if it is still whole. Collective."""
    damage = find_damage(step_dir)
    if damage is None:
        saved = read_commit(step_dir)
        _load(engine, saved, layout_changes(step_dir, saved.identity, identity, effective))
    else:
        print_rank0(f"the best weights could not be put back: {damage}")


def _load(engine: Engine, saved: Saved, changes: list[str]) -> None:
    if changes:
        print_rank0(f"{saved.step_dir}: {', '.join(changes)}: weights and moments are shared out anew")
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


def load_model(path: Path, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Model (fp32, eval mode), tokenizer and step folder of a run folder (its best step) or one step's folder."""
    step_dir = _step_of(path)
    if damage := damage_of(step_dir, 0, every=1):  # which reads COMMIT too
        raise UserError(f"{damage}; restore the file or name another step")
    saved = read_commit(step_dir)
    tokenizer = Tokenizer.load(step_dir / "tokenizer.model")
    model = GPT(ModelConfig(**saved.identity.model), saved.identity.vocab_size)
    model.load_state_dict(consolidated_weights(step_dir))
    return model.to(device).eval(), tokenizer, step_dir


def packing_of(step_dir: Path) -> PackingConfig:
    """How the documents of a step's run were packed: its model is to be evaluated with attention masked alike."""
    section = json.loads((step_dir / "run.json").read_bytes())["megagpt"]
    return PackingConfig(**section.get("packing", {}))  # a step of an older megagpt has none


def _step_of(path: Path) -> Path:
    if (path / COMMIT).is_file():
        return path
    step_dir = best(path) or next(reversed(committed(path)), None)
    if step_dir is None:
        raise UserError(f"{path} holds no committed checkpoint; give a run's out_dir, or one of its checkpoints/step_*")
    return step_dir
