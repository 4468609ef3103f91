"""The files of a DeepSpeed engine: which it would save, how they are loaded, and how they become plain weights."""

import contextlib
import copyreg
import io
from itertools import chain
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.process_group import rank, world_size
from megagpt.engine.optimizer import names_in_groups
from megagpt.engine.safe_pickle import check_pickles, load_checked, pickles_of

# Pickle the stage as Python 3.11.4 and later do; earlier ones pickle a call of getattr, which safe_pickle.py refuses.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (int(stage),)))
SETTINGS = ("betas", "eps", "weight_decay", "momentum", "lr_scale")  # lr is set before every step


def consolidated_weights(step_dir: Path) -> dict[str, Tensor]:
    """Return all weights of one committed step, of any ZeRO stage and number of ranks; tied ones share memory.

    fp32 tensors with the values of the master weights.
    Raises UserError, before anything is loaded, for a file that safe_pickle.py refuses.
    """
    check_pickles(pickles_of(step_dir))
    if any(step_dir.glob("*optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints
            weights = get_fp32_state_dict_from_zero_checkpoint(str(step_dir.parent), tag=step_dir.name)
    else:  # stage 0: the module is whole in one file
        saved = load_checked(step_dir / "mp_rank_00_model_states.pt")
        weights = saved["module"] | _masters(saved)
    return {name: weight.detach().float() for name, weight in weights.items()}


def _masters(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Return the fp32 weights that Adam updates at stage 0 in 16 bit, by name; none in fp32, or without an optimizer.

    They lie in the order of optimizer.decay_groups: one tensor each, or with DeepSpeed's FusedAdam one for each group.
    """
    module, optimizer = saved["module"], saved.get("optimizer") or {}
    groups = optimizer.get("fp32_groups_flat") or optimizer.get("fp32_groups") or []
    names = {weight.data_ptr(): name for name, weight in reversed(module.items())}  # of tied ones the first
    own = sorted(names.values(), key=list(module).index)
    settings = optimizer["optimizer_state_dict"]["param_groups"] if groups else []
    muon = any("momentum" in group for group in settings)
    all_decay = len(groups) - muon == 1  # or there are matrices alone, whose order is then the same
    parts = names_in_groups(
        {name: module[name].dim() for name in own},
        "all" if all_decay else "matrices",
        muon=muon,
        by_kind=any("lr_scale" in group for group in settings),
    )
    values = (value for group in groups for value in (group if isinstance(group, list) else [group]))
    masters: dict[str, Tensor] = {}
    left = chain(*parts.values())
    for flat in values:
        at = 0
        while at < flat.numel():
            name = next(left)
            masters[name] = flat.detach().view(-1).narrow(0, at, module[name].numel()).view(module[name].shape)
            at += module[name].numel()
    return {name: masters[names[weight.data_ptr()]] for name, weight in module.items()} if masters else {}


class Collector:
    """Replaces the checkpoint engine of a DeepSpeed engine: writes nothing, and collects what would be saved."""

    def __init__(self) -> None:
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict

    def makedirs(self, path: str, exist_ok: bool) -> None:
        """Whoever writes the files makes the folders."""

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> None: ...

    def is_decoupled(self) -> bool:
        return False


def files_to_save(engine: Engine, step_dir: Path) -> dict[Path, Any]:
    """Return what DeepSpeed would save on this rank, path -> state. Writes and copies nothing. Collective."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, (collector := Collector())
    # rank 0 alone would write zero_to_fp32.py, and a full disk would end in an error that the others never hear of
    engine._copy_recovery_script = lambda folder: None
    engine.save_checkpoint(str(step_dir.parent), tag=step_dir.name, save_latest=False)
    engine.checkpoint_engine = usual
    return collector.files


def load_engine(engine: Engine, step_dir: Path) -> None:
    """Load what `files_to_save` named: weights, moments, loss scale. Adam's settings stay those of the run file.

    For a step whose run had the same ranks, ZeRO stage and dtype; reshard.py loads others. Collective. Raises
    UserError, on every rank and before anything is loaded, for a file that safe_pickle.py refuses.
    """
    with errors_on_every_rank():
        check_pickles(pickles_of(step_dir)[rank() :: world_size()])
    settings = [{key: group[key] for key in SETTINGS if key in group} for group in engine.optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(step_dir.parent), tag=step_dir.name, load_lr_scheduler_states=False)
    assert loaded is not None, f"DeepSpeed found nothing to load in {step_dir}"  # it only warns
    for group, current in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(current)
