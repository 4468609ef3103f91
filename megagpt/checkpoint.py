"""Save and resume. A step counts only once it is committed; nothing half-written is ever taken for whole.

    checkpoints/step_00001000/    DeepSpeed's files, rng.<rank>.json, run.json, tokenizer.model
                                  manifest.<rank>.json: size and sha256 of the files of one rank
                                  COMMIT: written last; without it the folder is not a checkpoint
    checkpoints/latest, best      hints for people and tools, replaced atomically

Every rank writes and hashes its own files; when all agree, rank 0 commits. Loading picks the newest step whose
commit and files verify, the same one on every rank.
"""

import base64
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megagpt.config import BatchPlan, ModelConfig, RunConfig
from megagpt.distributed import barrier, broadcast_object, gather_objects, is_main, rank, say
from megagpt.engine import Engine, consolidated_weights, load_engine
from megagpt.errors import UserError
from megagpt.files import fsync, sha256_of, write_atomically
from megagpt.model import GPT
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
    )


@dataclass(frozen=True)
class Saved:
    """One committed step, verified: where it lies, and what its commit record says."""

    step_dir: Path
    state: TrainState
    identity: dict[str, Any]


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

    `effective` is the run file with all defaults written out.
    """
    out_dir = Path(effective["megagpt"]["out_dir"])
    step_dir = step_folder(out_dir, state.step)
    if is_main() and step_dir.exists():  # of an attempt that died while it saved
        _remove(step_dir)
    barrier()
    engine.save_checkpoint(str(folder(out_dir)), tag=step_dir.name, save_latest=False)
    write_atomically(step_dir / f"rng.{rank()}.json", json.dumps(_rng_state()).encode())
    if is_main():
        write_atomically(step_dir / "run.json", json.dumps(effective, indent=1).encode())
        write_atomically(step_dir / "tokenizer.model", tokenizer.model_bytes)
    barrier()
    manifests = gather_objects(_write_manifest(step_dir))
    if is_main():
        record = {
            "format": "megagpt-checkpoint",
            "version": 1,
            "state": state.as_json(),
            "identity": asdict(identity),
            "manifests": manifests,
        }
        write_atomically(step_dir / COMMIT, json.dumps(record, indent=1).encode())
        _hint(out_dir, "latest", step_dir)
        best_dir = step_folder(out_dir, state.stopper.best_step)
        if (best_dir / COMMIT).is_file():
            _hint(out_dir, "best", best_dir)
        _prune(out_dir)
    barrier()


def set_aside(out_dir: Path) -> None:
    """Rename an old run's folder, so that a fresh one can begin under its name. Collective."""
    barrier()
    if is_main() and out_dir.exists():
        aside = next(p for n in count(1) if not (p := out_dir.with_name(f"{out_dir.name}.old{n}")).exists())
        out_dir.rename(aside)
        say(f"the old run is now {aside}")
    barrier()


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
            _put_aside(refused)
            return _read_commit(step_dir)
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
    _set_rng_state(json.loads((saved.step_dir / f"rng.{rank()}.json").read_bytes()))


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
    saved = _read_commit(step_dir)
    for r in range(saved.identity["world_size"]):
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
    for path in sorted(step_dir.iterdir()):
        if path.is_file() and _owner(path.name) == rank():
            fsync(path)
            listed[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = step_dir / f"manifest.{rank()}.json"
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
        manifests = json.loads((step_dir / COMMIT).read_bytes())["manifests"]
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
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{step_dir / COMMIT} is damaged"
    return None


def _put_aside(damaged: list[Path]) -> None:
    """Damaged steps keep their files for a look, but no longer count among the newest."""
    if is_main():
        for step_dir in damaged:
            step_dir.rename(step_dir.with_name(f"damaged_{step_dir.name}"))
    barrier()


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


def _rng_state() -> dict[str, Any]:
    """Every random generator of this process, as plain JSON."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "cuda": base64.b64encode(cuda.numpy().tobytes()).decode(),
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    saved["numpy"]["state"]["key"] = np.array(saved["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(_bytes(saved["torch"]))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
