"""Save and resume, together on all ranks. A step counts only once it is committed (commit.py).

Every rank writes and hashes its own files; when all have, rank 0 commits. Loading picks the newest step whose commit
and files verify, the same one on every rank.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.async_writer import Writer, write_files
from megagpt.checkpoint.commit import (
    COMMIT,
    Saved,
    best,
    commit_on_record,
    committed,
    damage_of,
    disk_errors,
    folder,
    point_to,
    prune,
    put_aside,
    read_commit,
    remove,
    step_folder,
    superseded,
    write_commit,
    write_manifest,
)
from megagpt.checkpoint.identity import Identity, reshaped
from megagpt.checkpoint.rng import rng_state, seed_all, seed_from, set_rng_state
from megagpt.config.schema import KeepConfig, ModelConfig, PackingConfig
from megagpt.data.mixture import Mixture
from megagpt.data.tokenizer import Tokenizer
from megagpt.distributed.process_group import (
    Group,
    broadcast_object,
    gather_objects,
    is_main,
    rank,
    say,
    together,
    world_size,
)
from megagpt.engine.build import Engine, consolidated_weights, files_to_save, load_engine
from megagpt.engine.reshard import Shape, load_reshaped
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.train_state import TrainState


def save(
    engine: Engine,
    state: TrainState,
    mixture: Mixture,
    identity: Identity,
    tokenizer: Tokenizer,
    effective: dict[str, Any],
    writer: Writer,
) -> None:
    """Write and commit one step, or let the writer do so beside training; collective. Older steps go only after that.

    `effective` is the run file with all defaults written out. Raises UserError, on every rank, if a file of one of
    them cannot be written, now or by the save before: the step before stands.
    """
    writer.wait()
    out_dir, keep = Path(effective["megagpt"]["out_dir"]), KeepConfig(**effective["megagpt"]["keep"])
    step_dir = step_folder(out_dir, state.step)
    together(lambda: _make_room(step_dir))
    files = files_to_save(engine, step_dir)
    files[step_dir / f"rng.{rank()}.json"] = json.dumps(rng_state()).encode()
    if is_main():
        files[step_dir / "run.json"] = json.dumps(effective, indent=1).encode()
        files[step_dir / "tokenizer.model"] = tokenizer.model_bytes

    def write_and_commit(files: dict[Path, Any]) -> None:
        group = writer.group
        together(lambda: write_files(step_dir, files), group)
        manifests = gather_objects(together(lambda: write_manifest(step_dir, rank()), group), group)
        together(lambda: _commit(step_dir, state, mixture, identity, manifests), group)
        _rotate(out_dir, step_dir, state, keep, group)

    writer.start(files, write_and_commit)


def _make_room(step_dir: Path) -> None:
    if is_main():
        with disk_errors(step_dir):
            if step_dir.exists():  # of an attempt that died while it saved
                remove(step_dir)
            step_dir.mkdir(parents=True)


def _rotate(out_dir: Path, newest: Path, state: TrainState, keep: KeepConfig, group: Group) -> None:
    """Remove what nothing keeps any more, now that a newer step is committed. Collective."""
    superfluous = False
    if is_main():
        with _keeping_more():
            superfluous = bool(superseded(out_dir, keep))
    damaged = _damaged_of_newest(out_dir, group) if gather_objects(superfluous, group)[0] else []
    if is_main():
        with _keeping_more():
            if damaged:
                put_aside(damaged)
                point_to(out_dir, newest, state)
            prune(out_dir, keep)
    gather_objects(None, group)


@contextmanager
def _keeping_more() -> Iterator[None]:
    """What a disk has against rotation costs room on it, and no step: the newer one is committed."""
    try:
        yield
    except OSError as error:
        say(f"an older checkpoint could not be removed: {error}")


def _commit(step_dir: Path, state: TrainState, mixture: Mixture, identity: Identity, manifests: list[str]) -> None:
    if is_main():
        with disk_errors(step_dir):
            write_commit(step_dir, state, mixture, identity, manifests)
        try:
            point_to(step_dir.parent.parent, step_dir, state)
        except OSError as error:
            raise UserError(
                f"{step_dir} is saved, but no hint to it: {error}; mend that, and it is gone on from"
            ) from error


def _damaged_of_newest(out_dir: Path, group: Group) -> list[Path]:
    """The steps found damaged on the way from the newest back to the second that is whole. Collective.

    Before an older one goes: what should take its place may have rotted since it was written.
    """
    whole, damaged = 0, []
    for step_dir in reversed(gather_objects(committed(out_dir), group)[0]):
        damage = _damage(step_dir, group)
        if damage is None:
            whole += 1
        else:
            damaged.append(step_dir)
            say(f"checkpoint put aside: {damage}")
        if whole == 2:
            break
    return damaged


def set_aside(out_dir: Path) -> None:
    """Rename an old run's folder, so that a fresh one can begin under its name. Collective; raises UserError."""

    def rename() -> None:
        is_run = (out_dir / "run.json").is_file() or folder(out_dir).is_dir()
        if not (is_main() and is_run):
            return
        free = (out_dir.with_name(f"{out_dir.name}.old{n}") for n in count(1))
        aside = next(path for path in free if not path.exists())
        try:
            out_dir.rename(aside)
        except OSError as error:
            raise UserError(f"--fresh cannot rename {out_dir}: {error}; give another megagpt.out_dir") from error
        say(f"the old run is now {aside}")

    together(rename)


def newest_verified(out_dir: Path) -> Saved | None:
    """The newest step that every rank can verify; None before the first commit. Collective.

    Raises UserError if a step was ever committed and none verifies: a silent start from step 0 would lose the run.
    """
    candidates = broadcast_object(committed(out_dir))
    refused: list[Path] = []
    first_damage = ""
    for step_dir in reversed(candidates):
        damage = _damage(step_dir)
        if damage is None:
            return replace(read_commit(step_dir), passed_over=tuple(refused))
        refused.append(step_dir)
        say(f"checkpoint passed over: {damage}")
        first_damage = first_damage or damage
    recorded = broadcast_object(commit_on_record(out_dir))
    if recorded is not None and not refused:
        first_damage = f"{recorded} was committed and is gone"
    if first_damage:
        raise UserError(
            f"no checkpoint in {folder(out_dir)} is whole ({first_damage}); restore the file, or give --fresh to "
            "start again at step 0 (the old run is kept beside the new one)"
        )
    return None


def resume(engine: Engine, saved: Saved, changes: list[str], seed: int) -> None:
    """Load weights, moments and this rank's random generators. Collective.

    `changes`: what identity.reshaped found. Other ranks than those that saved seed their generators anew.
    """
    _load(engine, saved, changes)
    if saved.identity.world_size == world_size():
        set_rng_state(json.loads((saved.step_dir / f"rng.{rank()}.json").read_bytes()))
    else:
        say("  random generators: seeded anew from (megagpt.seed, step, rank)")
        seed_all(seed_from(seed, saved.state.step, rank()))
    together(lambda: put_aside(list(saved.passed_over)) if is_main() else None)


def restore(engine: Engine, step_dir: Path, identity: Identity, effective: dict[str, Any]) -> None:
    """Load the weights of a step that was saved earlier, if it is still whole. Collective."""
    damage = _damage(step_dir)
    if damage is None:
        saved = read_commit(step_dir)
        _load(engine, saved, reshaped(step_dir, saved.identity, identity, effective))
    else:
        say(f"the best weights could not be put back: {damage}")


def _load(engine: Engine, saved: Saved, changes: list[str]) -> None:
    if changes:
        say(f"{saved.step_dir}: {', '.join(changes)}: weights and moments are shared out anew")
        was, state = saved.identity, saved.state
        load_reshaped(
            engine,
            saved.step_dir,
            Shape(was.world_size, was.zero_stage, was.dtype),
            weight_decay_on=was.weight_decay_on,
            step=state.step,
            samples_seen=state.samples_seen,
        )
    else:
        load_engine(engine, saved.step_dir)


def _damage(step_dir: Path, group: Group = None) -> str | None:
    """What is wrong with the files of all ranks that saved a step, shared out over those there are now. Collective."""
    return next(filter(None, gather_objects(damage_of(step_dir, rank(), every=world_size()), group)), None)


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
