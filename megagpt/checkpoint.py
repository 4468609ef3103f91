"""Save and resume. A step counts only once it is committed; nothing half-written is ever taken for whole.

    checkpoints/step_00001000/    DeepSpeed's files, rng.<rank>.json, run.json, tokenizer.model
                                  manifest.<rank>.json: size and sha256 of the files of one rank
                                  COMMIT: written last; without it the folder is not a checkpoint
    checkpoints/latest, best      hints for people and tools, replaced atomically

Every rank writes and hashes its own files; when all agree, rank 0 commits. Loading picks the newest step whose
commit and files verify, the same one on every rank.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megagpt.config import BatchPlan, ModelConfig, RunConfig
from megagpt.distributed import barrier, broadcast_object, gather_objects, is_main, rank, say, together
from megagpt.engine import Engine, consolidated_weights, load_engine
from megagpt.errors import UserError
from megagpt.files import fsync, sha256_of, write_atomically
from megagpt.model import GPT
from megagpt.rng import rng_state, set_rng_state
from megagpt.state import TrainState
from megagpt.tokenizer import Tokenizer

COMMIT = "COMMIT"
KEEP = 2  # newest committed steps that stay, besides the best


@dataclass(frozen=True)
class Identity:
    """What must not change between saving and resuming, beside the weights themselves."""

    world_size: int
    zero_stage: int
    offload_optimizer: str
    dtype: str
    model: dict[str, Any]
    vocab_size: int
    data: dict[str, Any]
    weight_decay_on: str  # which parameters share Adam's groups


def identity_of(run: RunConfig, batch: BatchPlan, vocab_size: int, fingerprints: list[str]) -> Identity:
    """fingerprints: of the training datasets in the run file's order, then of the validation dataset."""
    cfg, ds = run.megagpt, run.deepspeed
    return Identity(
        world_size=batch.world_size,
        zero_stage=ds.zero_optimization.stage,
        offload_optimizer=ds.zero_optimization.offload_optimizer.device,
        dtype=ds.dtype,
        model=cfg.model.model_dump(),
        vocab_size=vocab_size,
        data={
            "fingerprints": fingerprints,
            "weights": [d.weight for d in cfg.data.train],
            "seed": cfg.data.seed,
        },
        weight_decay_on=cfg.regularization.weight_decay_on,
    )


@dataclass(frozen=True)
class Saved:
    """One committed step, verified: where it lies, and what its commit record says."""

    step_dir: Path
    state: TrainState
    identity: dict[str, Any]
    passed_over: tuple[Path, ...] = ()  # newer steps that are damaged


def folder(out_dir: Path) -> Path:
    return out_dir / "checkpoints"


def step_folder(out_dir: Path, step: int) -> Path:
    return folder(out_dir) / f"step_{step:08d}"


def best(out_dir: Path) -> Path | None:
    """The committed step that the `best` hint names."""
    hint = folder(out_dir) / "best"
    step_dir = folder(out_dir) / hint.read_text().strip() if hint.is_file() else None
    return step_dir if step_dir is not None and (step_dir / COMMIT).is_file() else None


def committed(out_dir: Path) -> list[Path]:
    """Committed steps, oldest first."""
    return sorted(path.parent for path in folder(out_dir).glob(f"step_*/{COMMIT}"))


def save(
    engine: Engine, state: TrainState, identity: Identity, tokenizer: Tokenizer, effective: dict[str, Any]
) -> None:
    """Write and commit one step; collective. Older steps are removed only after that.

    `effective` is the run file with all defaults written out. Raises UserError, on every rank, if a file of one of
    them cannot be written: the step before stands.
    """
    out_dir = Path(effective["megagpt"]["out_dir"])
    step_dir = step_folder(out_dir, state.step)
    if is_main() and step_dir.exists():  # of an attempt that died while it saved
        _remove(step_dir)
    barrier()
    engine.save_checkpoint(str(folder(out_dir)), tag=step_dir.name, save_latest=False)
    together(lambda: _write_own_files(step_dir, tokenizer, effective))
    manifests = gather_objects(together(lambda: _write_manifest(step_dir)))
    if is_main():
        record = {
            "format": "megagpt-checkpoint",
            "version": 1,
            "state": state.as_json(),
            "identity": asdict(identity),
            "manifests": manifests,
        }
        write_atomically(step_dir / COMMIT, json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())
        try:
            _point_to(out_dir, step_dir, state)
            _prune(out_dir)
        except OSError as error:  # the step is committed all the same
            say(f"an older checkpoint could not be removed: {error}")
    barrier()


def _write_own_files(step_dir: Path, tokenizer: Tokenizer, effective: dict[str, Any]) -> None:
    with _disk_errors(step_dir):
        write_atomically(step_dir / f"rng.{rank()}.json", json.dumps(rng_state()).encode())
        if is_main():
            write_atomically(step_dir / "run.json", json.dumps(effective, indent=1).encode())
            write_atomically(step_dir / "tokenizer.model", tokenizer.model_bytes)


@contextmanager
def _disk_errors(step_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{step_dir} could not be saved: {error}; the step before it stands") from error


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _point_to(out_dir: Path, step_dir: Path, state: TrainState) -> None:
    """The hints: the step just saved, and the best of the committed ones, early stopping's own if it was saved."""
    _hint(out_dir, "latest", step_dir)
    best_dir = step_folder(out_dir, state.stopper.best_step)
    if (best_dir / COMMIT).is_file():
        _hint(out_dir, "best", best_dir)
    else:
        losses = {path: _read_commit(path).state.val_loss for path in committed(out_dir)}
        if known := {path: loss for path, loss in losses.items() if loss is not None}:
            _hint(out_dir, "best", min(known, key=lambda path: known[path]))


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

    Raises UserError if steps were committed and none verifies: a silent start from step 0 would lose the run.
    """
    candidates = broadcast_object(committed(out_dir))
    refused: list[Path] = []
    first_damage = ""
    for step_dir in reversed(candidates):
        damage = next(filter(None, gather_objects(_damage(step_dir))), None)
        if damage is None:
            return replace(_read_commit(step_dir), passed_over=tuple(refused))
        refused.append(step_dir)
        say(f"checkpoint passed over: {damage}")
        first_damage = first_damage or damage
    if refused:
        raise UserError(
            f"no checkpoint in {folder(out_dir)} is whole ({first_damage}); restore the file, or give --fresh to "
            "start again at step 0 (the old run is kept beside the new one)"
        )
    return None


def resume(engine: Engine, saved: Saved) -> None:
    """Load weights, moments and this rank's random generators. Collective."""
    load_engine(engine, saved.step_dir)
    set_rng_state(json.loads((saved.step_dir / f"rng.{rank()}.json").read_bytes()))
    if is_main():
        _put_aside(saved.passed_over)
    barrier()


def restore(engine: Engine, step_dir: Path) -> None:
    """Load the weights of a step that was saved earlier, if it is still whole. Collective."""
    damage = next(filter(None, gather_objects(_damage(step_dir))), None)
    if damage is None:
        load_engine(engine, step_dir)
    else:
        say(f"the best weights could not be put back: {damage}")


def check_identity(saved: Saved, now: Identity) -> None:
    """Raises UserError naming what differs between the saved run and this one."""
    for name, value in asdict(now).items():
        if saved.identity[name] != value:
            before, after = _difference(saved.identity[name], value)
            raise UserError(
                f"{saved.step_dir} was saved with {name} {before}, and this run has {after}; start it as it was, or "
                "give another megagpt.out_dir for a new run"
            )


def changed_keys(step_dir: Path, effective: dict[str, Any]) -> list[str]:
    """The keys of the run file that differ from when the step was saved, as `key: before -> now`."""
    before = dict(_leaves(json.loads((step_dir / "run.json").read_bytes())))
    now = dict(_leaves(json.loads(json.dumps(effective))))
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def load_model(path: Path, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Model (fp32, eval mode), tokenizer and step folder of a run folder (its best step) or one step's folder."""
    step_dir = _step_of(path)
    if damage := _damage(step_dir, 0):  # which reads COMMIT too
        raise UserError(f"{damage}; restore the file or name another step")
    saved = _read_commit(step_dir)
    for r in range(1, saved.identity["world_size"]):
        if damage := _damage(step_dir, r):
            raise UserError(f"{damage}; restore the file or name another step")
    tokenizer = Tokenizer.load(step_dir / "tokenizer.model")
    model = GPT(ModelConfig(**saved.identity["model"]), saved.identity["vocab_size"])
    model.load_state_dict(consolidated_weights(step_dir))
    return model.to(device).eval(), tokenizer, step_dir


def _read_commit(step_dir: Path) -> Saved:
    record = json.loads((step_dir / COMMIT).read_bytes())
    return Saved(step_dir, TrainState.from_json(record["state"]), record["identity"])


def _step_of(path: Path) -> Path:
    if (path / COMMIT).is_file():
        return path
    step_dir = best(path) or next(reversed(committed(path)), None)
    if step_dir is None:
        raise UserError(f"{path} holds no committed checkpoint; give a run's out_dir, or one of its checkpoints/step_*")
    return step_dir


def _write_manifest(step_dir: Path) -> str:
    """Make this rank's files durable and list them; returns the sha256 of the list."""
    listed = {}
    manifest = step_dir / f"manifest.{rank()}.json"
    with _disk_errors(step_dir):
        for path in sorted(step_dir.iterdir()):
            if path.name.startswith("manifest.") or _owner(path.name) != rank():
                continue  # another rank writes its own manifest at this moment
            fsync(path)
            listed[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_atomically(manifest, json.dumps(listed, indent=1).encode())
        return sha256_of(manifest)


def _owner(name: str) -> int:
    """The rank that wrote a file: DeepSpeed puts it into the names of shards, and all else is rank 0's."""
    if name.startswith("rng."):
        return int(name.split(".")[1])
    return int(name.split("zero_pp_rank_")[1].split("_")[0]) if "zero_pp_rank_" in name else 0


def _damage(step_dir: Path, of_rank: int | None = None) -> str | None:
    """What is wrong with the files of one rank (default: this one), or None."""
    r = rank() if of_rank is None else of_rank
    try:
        record = json.loads((step_dir / COMMIT).read_bytes())
        if record.pop("sha256") != _digest(record):
            return f"{step_dir / COMMIT} was changed"
        manifests = record["manifests"]
        if r >= len(manifests):
            return None  # another number of ranks: check_identity says so
        manifest = step_dir / f"manifest.{r}.json"
        if sha256_of(manifest) != manifests[r]:
            return f"{manifest} was changed"
        for name, info in json.loads(manifest.read_bytes()).items():
            path = step_dir / name
            if path.stat().st_size != info["bytes"] or sha256_of(path) != info["sha256"]:
                return f"{path} is damaged"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{step_dir / COMMIT} is damaged"
    return None


def _put_aside(damaged: tuple[Path, ...]) -> None:
    """Damaged steps keep their files for a look, but no longer count among the newest."""
    for step_dir in damaged:
        free = (step_dir.with_name(f"damaged{n}_{step_dir.name}") for n in count(1))
        step_dir.rename(next(path for path in free if not path.exists()))


def _prune(out_dir: Path) -> None:
    steps = committed(out_dir)
    for step_dir in steps[:-KEEP]:
        if step_dir != best(out_dir):
            _remove(step_dir)


def _remove(step_dir: Path) -> None:
    (step_dir / COMMIT).unlink(missing_ok=True)  # first, so that a half-removed folder is no checkpoint
    shutil.rmtree(step_dir)


def _hint(out_dir: Path, name: str, step_dir: Path) -> None:
    write_atomically(folder(out_dir) / name, step_dir.name.encode() + b"\n")


def _difference(before: Any, after: Any) -> tuple[Any, Any]:
    """Of two sections only the keys that differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return before, after
    keys = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    return {k: before.get(k) for k in sorted(keys)}, {k: after.get(k) for k in sorted(keys)}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
