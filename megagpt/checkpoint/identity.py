"""What a checkpoint says of the run that saved it, and what of that may differ in the run that resumes from it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megagpt.config.batch import BatchPlan
from megagpt.config.run_file import RunConfig
from megagpt.data.dataset import Dataset
from megagpt.errors import UserError

SHAPE = {
    "world_size": "ranks",
    "zero_stage": "ZeRO stage",
    "offload_optimizer": "optimizer offload",
    "dtype": "dtype",
}  # of a checkpoint's identity what may change
LAYOUT = ("zero_optimization.", "data_types.", "bf16.", "fp16.", "optimizer.type:", "optimizer.params.torch_adam:")


@dataclass(frozen=True)
class Identity:
    """What a resumed run is compared with: SHAPE may have changed since, the rest must not."""

    world_size: int
    zero_stage: int
    offload_optimizer: str
    dtype: str
    model: dict[str, Any]
    vocab_size: int
    tokenizer: str  # sha256
    data: dict[str, Any]  # the order of the samples, and what the model is validated on; mixture.py has the rest
    weight_decay_on: Literal["matrices", "all"]  # which parameters share Adam's groups


def identity_of(run: RunConfig, batch: BatchPlan, vocab_size: int, val: Dataset) -> Identity:
    cfg, ds = run.megagpt, run.deepspeed
    return Identity(
        world_size=batch.world_size,
        zero_stage=ds.zero_optimization.stage,
        offload_optimizer=ds.zero_optimization.offload_optimizer.device,
        dtype=ds.dtype,
        model=cfg.model.model_dump(),
        vocab_size=vocab_size,
        tokenizer=val.manifest.tokenizer.sha256,
        data={
            "seed": cfg.data.seed,
            "val": val.fingerprint,
            "best-fit rows of": cfg.seq_len if cfg.packing.kind == "best-fit" else None,  # their numbers are the order
        },
        weight_decay_on=cfg.regularization.weight_decay_on,
    )


def check_identity(step_dir: Path, was: Identity, now: Identity) -> None:
    """Raises UserError naming what differs between the run that saved a step and this one, and may not."""
    for name, value in asdict(now).items():
        if getattr(was, name) != value and name not in SHAPE:
            before, after = _difference(getattr(was, name), value)
            raise UserError(
                f"{step_dir} was saved with {name} {before}, and this run has {after}; start it as it was, or "
                "give another megagpt.out_dir for a new run"
            )


def layout_changes(step_dir: Path, was: Identity, now: Identity, effective: Mapping[str, Any]) -> list[str]:
    """What has changed, in words, in how weights and moments lie on the ranks; if nothing, DeepSpeed loads its files.

    `was` is the identity of the run that saved the step, `now` this run's, `effective` its run file.
    Raises UserError for what lies outside of the files.
    """
    pairs = [(label, getattr(was, key), getattr(now, key)) for key, label in SHAPE.items()]
    changes = [f"{label} {before} -> {after}" for label, before, after in pairs if before != after]
    changes = changes or [line for line in changed_keys(step_dir, effective) if line.startswith(LAYOUT)]
    run_files = (effective, json.loads((step_dir / "run.json").read_bytes()))
    on_nvme = {key for run in run_files for key, value in _leaves(run) if value == "nvme"}
    if changes and on_nvme:
        raise UserError(
            f"{step_dir} cannot go on with {', '.join(changes)}: {min(on_nvme)} is nvme, and what lies there is "
            "not in the checkpoint; start it as it was saved, or give another megagpt.out_dir for a new run"
        )
    return changes


def changed_keys(step_dir: Path, effective: Mapping[str, Any]) -> list[str]:
    """The keys of the run file that differ from when the step was saved, as `key: before -> now`."""
    before = dict(_leaves(json.loads((step_dir / "run.json").read_bytes())))
    now = dict(_leaves(json.loads(json.dumps(effective))))
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _difference(before: Any, after: Any) -> tuple[Any, Any]:
    """Of two sections only the keys that differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return before, after
    keys = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    return {k: before.get(k) for k in sorted(keys)}, {k: after.get(k) for k in sorted(keys)}
