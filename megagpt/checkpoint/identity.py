"""The identity of a run in its checkpoints: what must be equal to resume, and what may change (elastic resume)."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megagpt.config.batch import BatchPlan
from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig
from megagpt.config.schema import MegaGPTConfig
from megagpt.data.dataset import Dataset
from megagpt.data.packing import PACKING
from megagpt.errors import UserError

# Fields of Identity that may change between resumes, and their names for people.
SHAPE = {
    "world_size": "ranks",
    "zero_stage": "ZeRO stage",
    "offload_optimizer": "optimizer offload",
    "dtype": "dtype",
}
# The keys of `Identity.data` that say what the best step is the best by.
DECIDING = ("val", "val weights", "val of")
# The key of `Identity.data` with the validation sets that do not decide.
OTHERS = "other val"
# Keys of the run file that change how DeepSpeed lays out its state.
LAYOUT = re.compile(r"(zero_optimization|data_types|bf16|fp16)\..*|optimizer\.(type|params\.torch_adam)")


@dataclass(frozen=True)
class Identity:
    """The properties that a checkpoint shares with the run that resumes it; those of SHAPE may differ."""

    world_size: int
    zero_stage: int
    offload_optimizer: str
    dtype: str
    model: dict[str, Any]
    vocab_size: int
    tokenizer: str  # sha256
    data: dict[str, Any]  # the seed of the sample order, and the validation data; the mixture records the rest
    weight_decay_on: Literal["matrices", "all"]  # decides which parameters share an optimizer group
    optimizer: Literal["Adam", "Muon"] = "Adam"  # decides what it keeps of each parameter
    lr_scale: bool = False  # whether embeddings, head and vectors are optimizer groups of their own


def identity_of(run: RunConfig, batch: BatchPlan, vocab_size: int, val: Mapping[str, Dataset]) -> Identity:
    """Return the identity of a run on the ranks there are now. `vocab_size` is padded, `val` the validation sets."""
    cfg, ds = run.megagpt, run.deepspeed
    return Identity(
        world_size=batch.world_size,
        zero_stage=ds.zero_optimization.stage,
        offload_optimizer=ds.zero_optimization.offload_optimizer.device,
        dtype=ds.dtype,
        model=cfg.model.identity(),
        vocab_size=vocab_size,
        tokenizer=next(iter(val.values())).manifest.tokenizer.sha256,
        data={
            "seed": cfg.data.seed,
            **_validation_data(cfg, val),
            **packing_identity(cfg.packing.kind, cfg.seq_len),
        },
        weight_decay_on=cfg.regularization.weight_decay_on,
        optimizer="Muon" if ds.optimizer.type == "Muon" else "Adam",
        lr_scale=ds.optimizer.params.lr_scale is not None,
    )


def _validation_data(cfg: MegaGPTConfig, val: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return what a checkpoint records of the validation data: what val/loss is measured on, and the other sets.

    Losses on other data are not compared with the best one. Sets that do not decide may come and go.
    """
    deciding = {name: val[name].fingerprint for name in cfg.deciding_sets}
    weights = {name: one.weight for name, one in cfg.deciding_sets.items() if one.weight is not None}
    others = {name: dataset.fingerprint for name, dataset in val.items() if name not in deciding}
    return {
        "val": deciding if len(deciding) > 1 else next(iter(deciding.values())),
        **({"val weights": weights} if weights and len(deciding) > 1 else {}),
        **({"val of": "averaged weights"} if cfg.average_decides else {}),
        **({OTHERS: others} if others else {}),
    }


def packing_identity(kind: str, seq_len: int) -> dict[str, int | None]:
    """Return what a checkpoint records of the packing.

    Samples are drawn by their rows' numbers, and the method and seq_len decide which row has which number. Windows of
    the stream are drawn by their places in it, so a run may change between kinds that draw those.
    """
    # The first key stands in every checkpoint, also in those of runs that pack no rows.
    return {"best-fit rows of": None} | ({f"{kind} rows of": seq_len} if PACKING[kind].plan_rows else {})


def check_identity(step_dir: Path, was: Identity, now: Identity) -> None:
    """Raise UserError naming a difference between the run that saved a step and this one that must not be."""
    decided, decides = ({key: one.data.get(key) for key in DECIDING} for one in (was, now))
    if decided != decides:
        raise UserError(
            f"checkpoint {step_dir}: val/loss was measured on {_listed(decided)}, and now it would be on "
            f"{_listed(decides)}, so that no step could be compared with the best; {_way_back(step_dir, was, now)}, or "
            "give another megagpt.out_dir for a new run"
        )
    of_before = asdict(was)
    for name, value in asdict(now).items():
        before, after = _difference(of_before[name], value)
        if before != after and name not in SHAPE:
            raise UserError(
                f"checkpoint {step_dir} was saved with {name} {before}, and this run has {after}; start it as it was, "
                "or give another megagpt.out_dir for a new run"
            )


def layout_changes(step_dir: Path, was: Identity, now: Identity, effective: Mapping[str, Any]) -> list[str]:
    """Describe what changed in how the state is sharded over ranks; if nothing did, DeepSpeed loads its own files.

    `was` is the identity of the run that saved the step, `now` this run's, `effective` its run file.
    Raises UserError where some of the state is not in the checkpoint.
    """
    pairs = [(label, getattr(was, key), getattr(now, key)) for key, label in SHAPE.items()]
    changes = [f"{label} {before} -> {after}" for label, before, after in pairs if before != after]
    changes = changes or described(changed_keys(step_dir, effective), LAYOUT)
    run_files = (effective, json.loads((step_dir / "run.json").read_bytes()))
    on_nvme = {key for run in run_files for key, value in leaves(run).items() if value == "nvme"}
    if changes and on_nvme:
        raise UserError(
            f"checkpoint {step_dir} cannot be resumed with {', '.join(changes)}: {min(on_nvme)} is nvme, and the state "
            "on NVMe is not in the checkpoint; start the run as it was saved, or give another megagpt.out_dir"
        )
    return changes


def changed_keys(step_dir: Path, effective: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys of the run file that differ from when the step was saved, with the values before and now."""
    before = leaves(json.loads((step_dir / "run.json").read_bytes()))
    now = leaves(json.loads(json.dumps(effective)))
    return {
        key: (before.get(key, "absent"), now.get(key, "absent"))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def described(changes: Mapping[str, tuple[Any, Any]], keys: re.Pattern[str] = re.compile(".*")) -> list[str]:
    """Return `key: before -> now`, as typed, for each change of a key that matches."""
    matching = {key: change for key, change in changes.items() if keys.fullmatch(key)}
    return [f"{key}: {_as_typed(before)} -> {_as_typed(now)}" for key, (before, now) in matching.items()]


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _way_back(step_dir: Path, was: Identity, now: Identity) -> str:
    """Return what to set so that val/loss is measured as it was."""
    val = now.data["val"]
    sets = (val if isinstance(val, dict) else {}) | now.data.get(OTHERS, {})
    if same := next((name for name, data in sets.items() if data == was.data.get("val")), None):
        return f"set megagpt.early_stopping.monitor=val/loss/{same}"
    return f"set megagpt.data.val and megagpt.early_stopping.monitor as in {step_dir / 'run.json'}"


def _listed(decides: Mapping[str, Any]) -> str:
    """Name the data that val/loss is measured on, by the beginnings of fingerprints."""
    val, weights = decides["val"], decides["val weights"] or {}
    if not isinstance(val, dict):
        return f"the data {val!s:.12}"
    parts = [f"{name} ({data:.12}" + (f", weight {weights[name]:g})" if weights else ")") for name, data in val.items()]
    return "the mean of " + ", ".join(parts)


def _difference(before: Any, after: Any) -> tuple[Any, Any]:
    """Reduce two sections to the keys that differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return before, after
    keys = [key for key in before.keys() | after.keys() if key != OTHERS and before.get(key) != after.get(key)]
    return {k: before.get(k) for k in sorted(keys)}, {k: after.get(k) for k in sorted(keys)}
