"""Committed steps on disk: which there are, and whether they are undamaged.

    checkpoints/step_00001000/    DeepSpeed's files, rng.<rank>.json, run.json, tokenizer.model
                                  manifest.<rank>.json: size and sha256 of the files of one rank
                                  COMMIT: written last; without it the folder is not a checkpoint
    checkpoints/latest, best      pointers for people and tools, replaced atomically
    committed                     the newest commit's name, outside that folder: a lost folder is no new run

Nothing here communicates with other ranks: save.py and verification.py do.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.atomic_files import fsync, leads_out, sha256_of, write_atomically
from megagpt.checkpoint.identity import Identity
from megagpt.data.mixture import Mixture
from megagpt.errors import UserError
from megagpt.train_state import TrainState

COMMIT = "COMMIT"
POINTERS = ("latest", "best")

VERSION = 2


@dataclass(frozen=True)
class Saved:
    """A committed, verified step: its folder, and the contents of its commit record."""

    step_dir: Path
    state: TrainState
    mixture: Mixture
    identity: Identity
    finite: bool = False  # every rank checked its numbers before it saved them; older versions did not tell
    saved_at: int | None = None  # seconds since 1970; older versions did not tell
    passed_over: tuple[Path, ...] = ()  # newer, damaged steps


def folder(out_dir: Path) -> Path:
    """Return the folder of a run's steps."""
    return out_dir / "checkpoints"


def step_folder(out_dir: Path, step: int) -> Path:
    """Return the folder of one step, whether it exists or not."""
    return folder(out_dir) / f"step_{step:08d}"


def run_of(path: Path) -> Path:
    """Return the folder of the run that a step or pointer is in; `checkpoints` between them may be left out."""
    return path.parents[1] if path.parent.name == "checkpoints" else path.parent


def best(out_dir: Path) -> Path | None:
    """Return the committed step that the `best` pointer names."""
    return pointed(out_dir, "best")


def pointed(out_dir: Path, pointer: str) -> Path | None:
    """Return the committed step that a pointer names."""
    hint = folder(out_dir) / pointer
    name = hint.read_bytes().strip() if hint.is_file() else b""
    return next((step_dir for step_dir in committed(out_dir) if step_dir.name.encode() == name), None)


def committed(out_dir: Path) -> list[Path]:
    """Return the committed steps, oldest first."""
    return sorted(path.parent for path in folder(out_dir).glob(f"step_*/{COMMIT}"))


def commit_on_record(out_dir: Path) -> str | None:
    """Return the name of a step that was committed here once, whether it still exists or not."""
    for record in (out_dir / "committed", folder(out_dir) / "latest"):
        if record.is_file():
            return record.read_text(errors="replace").strip() or record.name
    return next((path.name for path in folder(out_dir).glob("damaged*_step_*")), None)


def read_commit(step_dir: Path) -> Saved:
    """Read a step's COMMIT. Raises UserError for another format version or foreign contents."""
    record = json.loads((step_dir / COMMIT).read_bytes())
    if (version := record.get("version")) != VERSION:
        raise UserError(
            f"checkpoint {step_dir} has format {version}, and this megagpt reads format {VERSION}; resume with the "
            "megagpt that saved it, or give another megagpt.out_dir for a new run"
        )
    try:
        state, mixture = TrainState.from_json(record["state"]), Mixture.from_json(record["mixture"])
        identity = Identity(**record["identity"])
        saved_at = record.get("saved_at")
        return Saved(step_dir, state, mixture, identity, finite=record.get("finite") is True, saved_at=saved_at)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"checkpoint {step_dir} has an unreadable {COMMIT} ({error!r}); "
            f"delete {step_dir} to resume from the step before"
        ) from error


def newest_record(out_dir: Path) -> Saved | None:
    """Return the newest step whose commit record is undamaged; its other files are not checked.

    A live run may delete steps meanwhile: then those that it has committed since are looked at.
    """
    while True:
        gone = False
        for step_dir in reversed(committed(out_dir)):
            try:
                if _record_of(step_dir) is not None:
                    return read_commit(step_dir)
            except FileNotFoundError:
                gone = True
        if not gone:
            return None


def write_rank_manifest(step_dir: Path, rank: int) -> str:
    """Sync this rank's files to disk and list their sizes and hashes; returns the sha256 of the list."""
    listed = {}
    manifest = step_dir / f"manifest.{rank}.json"
    for path in sorted(step_dir.iterdir()):
        if path.name.startswith("manifest.") or _owner(path.name) != rank:
            continue  # another rank may be writing its own manifest right now
        fsync(path)
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_atomically(manifest, json.dumps(listed, indent=1).encode())
    return sha256_of(manifest)


def _owner(name: str) -> int:
    """Return the rank that wrote a file: DeepSpeed names it in its shards; everything else is rank 0's."""
    if name.startswith("rng."):
        return int(name.split(".")[1])
    return int(name.split("zero_pp_rank_")[1].split("_")[0]) if "zero_pp_rank_" in name else 0


@contextmanager
def disk_errors(step_dir: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the step."""
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoint {step_dir} could not be saved: {error}; the one before it is intact") from error


def write_commit(
    step_dir: Path,
    state: TrainState,
    mixture: Mixture,
    identity: Identity,
    manifests: list[str],
    *,
    finite: bool = False,
) -> None:
    """Write the last of a step's files: from here on it counts. `manifests`: the sha256 of each rank's manifest.

    `finite`: every rank has checked its numbers.
    The folders above are synced first: a power cut can undo a folder that was not, with all files in it.
    """
    for made in (step_dir, step_dir.parent, step_dir.parent.parent):
        fsync(made.parent)
    record = {
        "format": "megagpt-checkpoint",
        "version": VERSION,
        "state": state.as_json(),
        "mixture": mixture.as_json(),
        "identity": asdict(identity),
        "manifests": manifests,
        "finite": finite,
        "saved_at": round(time.time()),
    }
    write_atomically(step_dir / COMMIT, json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _record_of(step_dir: Path) -> dict[str, Any] | None:
    """Return the commit record, or None if it is not what was written."""
    try:
        record: dict[str, Any] = json.loads((step_dir / COMMIT).read_bytes())
        return record if record.pop("sha256") == _digest(record) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def damage_of(step_dir: Path, rank: int, *, every: int | None = None, hashes: bool = True) -> str | None:
    """Return what is wrong with the files of one rank, or None; without `hashes`, only their sizes are compared.

    With `every`, also of each `every`-th rank after it: rank 0 and every 1 check the files of all ranks.
    """
    try:
        if (record := _record_of(step_dir)) is None:
            return f"{step_dir / COMMIT} was changed"
        manifests, ranks = record["manifests"], record["identity"]["world_size"]
        if len(manifests) != ranks:
            return f"{step_dir} has the files of {len(manifests)} ranks, not of {ranks}"
        for r in range(len(manifests))[rank :: every or len(manifests)]:
            manifest = step_dir / f"manifest.{r}.json"
            if sha256_of(manifest) != manifests[r]:
                return f"{manifest} was changed"
            for name, info in json.loads(manifest.read_bytes()).items():
                if leads_out(step_dir, name):
                    return f"{manifest} names {name!r}, which leads out of its folder"
                path = step_dir / name
                if path.stat().st_size != info["bytes"] or (hashes and sha256_of(path) != info["sha256"]):
                    return f"{path} is damaged"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{step_dir / COMMIT} is damaged"
    return None


def update_latest_and_best(out_dir: Path, step_dir: Path, state: TrainState) -> None:
    """Point `latest` to the step just saved, and `best` to early stopping's best or the lowest loss that was saved."""
    _point(folder(out_dir) / "latest", step_dir)
    _point(out_dir / "committed", step_dir)
    best_dir = step_folder(out_dir, state.stopper.best_step)
    if (best_dir / COMMIT).is_file():
        _point(folder(out_dir) / "best", best_dir)
    elif ranked := by_loss(committed(out_dir)):
        _point(folder(out_dir) / "best", ranked[0])


def _point(pointer: Path, step_dir: Path) -> None:
    write_atomically(pointer, step_dir.name.encode() + b"\n")


def by_loss(steps: list[Path]) -> list[Path]:
    """Return the steps whose validation loss is a finite number, the lowest first."""
    records = {path: _record_of(path) for path in steps}
    losses = {path: record["state"]["val_loss"] for path, record in records.items() if record is not None}
    known = {path: loss for path, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(known, key=lambda path: known[path])
