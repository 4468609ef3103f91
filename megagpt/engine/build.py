"""The one room that talks to DeepSpeed: from a RunConfig to a ready engine, and from its files back to weights."""

import contextlib
import copyreg
import io
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer

from megagpt.config.deepspeed import BatchPlan, DeepSpeedConfig, RunConfig
from megagpt.config.run_file import explain
from megagpt.config.schema import MegaGPTConfig
from megagpt.distributed.process_group import neighbors, rank, together, world_size
from megagpt.engine.compilation import compile_blocks
from megagpt.engine.optimizer import clip_before_step, decay_groups
from megagpt.engine.precision import adam_on_the_host
from megagpt.engine.safe_pickle import check_pickles, load_checked, pickles_of
from megagpt.errors import UserError
from megagpt.model.attention import over_ranks, prefer_cudnn
from megagpt.model.flops import bucket_elements
from megagpt.model.gpt import GPT, Block, Recompute
from megagpt.model.recompute import (
    RunAgain,
    recompute_blocks,
    recompute_inside,
    refuse_what_cannot_act,
    set_memory_budget,
)

# left to itself, DeepSpeed guesses the same and warns that it did
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # names that DeepSpeed uses

import deepspeed  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig as ConfigReader  # noqa: E402
from deepspeed.runtime.config_utils import DeepSpeedConfigModel  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine as Engine  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.sequence.layer import register_all_to_all_group  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

__all__ = [
    "ConfigReader",
    "Engine",
    "before_update",
    "build_engine",
    "check_deepspeed_keys",
    "consolidated_weights",
    "effective_config",
    "files_to_save",
    "load_engine",
    "recompute_hook",
    "set_lr",
]

# Sections that we act on ourselves: Adam is built below, activations and TensorBoard have rooms of their own.
KEPT_FROM_DEEPSPEED = {"optimizer", "activation_checkpointing", "tensorboard"}
# As from Python 3.11.4 on; before, it is pickled as a call of getattr, which safe_pickle.py refuses.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (int(stage),)))
ADAM_SETTINGS = ("betas", "eps", "weight_decay")  # lr is set anew at every step


def build_engine(
    run: RunConfig, batch: BatchPlan, vocab_size: int, device: torch.device, *, compiled: bool = False
) -> Engine:
    """Model, optimizer and ZeRO as the run file says. Raises UserError for what DeepSpeed refuses.

    `compiled`: whether to compile the blocks, the same on every rank (compilation.compiles decides).
    """
    # gloo does all that training needs: without this, a CPU rank compiles a shared-memory operator at its first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    cfg, ds = run.megagpt, run.deepspeed
    config = effective_config(run, batch, vocab_size, device)
    if _clips_itself(ds):
        config["gradient_clipping"] = 0.0
    check_deepspeed_keys(config)
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=ds.zero_optimization.stage == 3):
        model = GPT(cfg.model, vocab_size, dropout=cfg.regularization.dropout)
    if batch.sequence_parallel_size > 1:
        share_positions(model, batch.sequence_parallel_size)
    if compiled:
        set_memory_budget(cfg.recompute)
        compile_blocks(model, cfg.out_dir / "compiled", recompute_inside(cfg.recompute, model.dropout))
        if ds.zero_optimization.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [Block])  # hooks inside a block would break its graph
    prefer_cudnn(device)
    model.recompute = recompute_hook(cfg, ds, device, compiled=compiled)
    groups = decay_groups(model, ds.optimizer.params.weight_decay, cfg.regularization.weight_decay_on)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=partial(build_optimizer, ds=ds, device=device),
            config=config,
        )
    except (ValueError, AssertionError, NotImplementedError) as error:  # how DeepSpeed refuses a combination
        raise UserError(f"DeepSpeed refuses the run file: {error}") from error
    if ds.zero_optimization.stage == 0 and ds.dtype != "fp32":
        # DeepSpeed has Adam take a step of zeros to make its moments: it would count and decay the weights
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def share_positions(model: GPT, size: int) -> None:
    """Let `size` neighboring ranks have a stretch of each sample's positions each: DeepSpeed-Ulysses. Collective.

    DeepSpeed is told the size for its batch arithmetic, but handed no `mpu`: it partitions and averages over all ranks
    as it does without, and each rank's loss being the mean over its own targets, that average is the gradient.
    (Its own parallel_state_sp as `mpu` would divide by the number of groups, and add up norms as if a group's ranks
    held parts of a model.)
    """
    group = register_all_to_all_group(neighbors(size))

    def exchange(x: Tensor) -> Tensor:
        return torch.ops.deepspeed.dim_zero_all_to_all(x.contiguous(), group)  # differentiable, also when compiled

    for block in model.blocks():
        block.attn.attend = over_ranks(block.attn.attend, exchange, size)
    model.part = rank() % size


def check_deepspeed_keys(config: dict[str, Any]) -> None:
    """Let DeepSpeed check its own sections before the model takes memory; raises UserError with its reason."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except ValidationError as error:
        wrong = error.errors()[0]["loc"][0]
        section = next((key for key, value in config.items() if isinstance(value, dict) and wrong in value), "")
        models = {model.__name__: model for model in DeepSpeedConfigModel.__subclasses__()}
        raise UserError(explain(error, models[error.title], section=section)) from error
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses the run file: {error}") from error
    except TypeError as error:  # it looks at few types itself
        raise UserError(f"DeepSpeed cannot read the run file, as some value is of the wrong type: {error}") from error


def effective_config(run: RunConfig, batch: BatchPlan, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's part of the run file with what it leaves out filled by rule. What the file says stays."""
    config = {key: value for key, value in run.deepspeed_raw.items() if key not in KEPT_FROM_DEEPSPEED}
    for dotted, value in _filled(run, batch, vocab_size, device).items():
        *parents, leaf = dotted.split(".")
        node = config
        for key in parents:
            node[key] = dict(node.get(key, {}))
            node = node[key]
        node.setdefault(leaf, value)
    return config


def _filled(run: RunConfig, batch: BatchPlan, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """The keys that a run file may leave out, with the reason for each value."""
    stage = run.deepspeed.zero_optimization.stage
    bucket = bucket_elements(run.megagpt.model, vocab_size, batch.world_size)
    filled: dict[str, Any] = {
        "gradient_accumulation_steps": batch.accumulation,
        "timers.throughput.enabled": False,  # else the device is synchronized at every forward and step
        "steps_per_print": None,  # our monitor prints
    }
    if run.deepspeed.bf16.enabled:
        # a pass over all gradients, for DeepSpeed to leave out a bad step: guards.Gate does, but not at CPUAdam
        filled["bf16.check_grad_overflow"] = adam_on_the_host(run.deepspeed, device)
    if stage > 0:
        # DeepSpeed's 5e8 elements would be gigabytes of buffer, and one bucket, so that overlap_comm could hide nothing
        filled["zero_optimization.reduce_bucket_size"] = bucket
        filled["zero_optimization.allgather_bucket_size"] = bucket
    if stage in (1, 2) and batch.world_size == 1:
        filled["zero_optimization.contiguous_gradients"] = False  # no peers: no hooks and copies for their sake
    if run.deepspeed.zero_optimization.offload_optimizer.device != "none":
        filled["zero_force_ds_cpu_optimizer"] = adam_on_the_host(run.deepspeed, device)
    return filled


def build_optimizer(groups: Iterable[dict[str, Any]], ds: DeepSpeedConfig, device: torch.device) -> Optimizer:
    """Adam with torch's fused kernel, which guards.Gate can close; DeepSpeed's CPUAdam for offload beside a GPU."""
    p = ds.optimizer.params
    decoupled = ds.optimizer.type == "AdamW" or p.adam_w_mode
    adam: dict[str, Any] = {"lr": p.lr, "betas": p.betas, "eps": p.eps}
    optimizer: Optimizer
    if adam_on_the_host(ds, device):
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **adam)
    else:
        optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, fused=True, **adam)
    if _clips_itself(ds):
        clip_before_step(optimizer, ds.gradient_clipping)
    return optimizer


def _clips_itself(ds: DeepSpeedConfig) -> bool:
    """At ZeRO stage 0 in fp32 DeepSpeed clips but forgets the norm, so the optimizer does both."""
    return ds.zero_optimization.stage == 0 and ds.dtype == "fp32"


def set_lr(engine: Engine, lr: float) -> None:
    """The learning rate of the next step. It is a function of the step number, so no scheduler has to be saved."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def before_update(engine: Engine, act: Callable[[Optimizer, Tensor | float | None], None]) -> None:
    """Call act(optimizer, gradient norm over all ranks) whenever Adam is about to change weights.

    Under ZeRO that is once for each group of parameters, and never for a step that DeepSpeed leaves out itself: at
    stage 3, at stages 1 and 2 in fp32, and at stage 0 in bf16 one whose norm is not finite; in fp16 every such one.
    """
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    inner.register_step_pre_hook(lambda optimizer, args, kwargs: act(optimizer, outer._global_grad_norm))


def recompute_hook(cfg: MegaGPTConfig, ds: DeepSpeedConfig, device: torch.device, *, compiled: bool) -> Recompute:
    """How the model runs a block in training. Raises UserError for a setting that could not act."""
    refuse_what_cannot_act(cfg, ds, device, compiled=compiled)
    recompute = cfg.recompute
    run_again = _deepspeed_checkpoint(ds) if recompute.kind == "deepspeed" else None
    return recompute_blocks(recompute, cfg.regularization.dropout, run_again, compiled=compiled)


def _deepspeed_checkpoint(ds: DeepSpeedConfig) -> RunAgain:
    section = ds.activation_checkpointing
    deepspeed.checkpointing.configure(
        None,
        partition_activations=False,
        contiguous_checkpointing=False,
        checkpoint_in_cpu=section.cpu_checkpointing,
        synchronize=section.synchronize_checkpoint_boundary,
        profile=section.profile,
    )
    return deepspeed.checkpointing.checkpoint


def consolidated_weights(step_dir: Path) -> dict[str, Tensor]:
    """All weights of one committed step, whatever its ZeRO stage and number of ranks; tied ones share.

    fp32 tensors of the masters' values, but at stage 0 in 16 bit of the weights that the model computes with.
    Raises UserError, before anything is loaded, for a file that safe_pickle.py refuses.
    """
    check_pickles(pickles_of(step_dir))
    if any(step_dir.glob("*optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it is chatty
            weights = get_fp32_state_dict_from_zero_checkpoint(str(step_dir.parent), tag=step_dir.name)
    else:  # stage 0: the module is whole in one file
        weights = load_checked(step_dir / "mp_rank_00_model_states.pt")["module"]
    return {name: weight.detach().float() for name, weight in weights.items()}


class Collector:
    """Stands in for the checkpoint engine of a DeepSpeed engine: it writes nothing, and keeps what was to be saved."""

    def __init__(self) -> None:
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict

    def makedirs(self, path: str, exist_ok: bool) -> None:
        """Folders are made by who writes the files."""

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> None: ...

    def is_decoupled(self) -> bool:
        return False


def files_to_save(engine: Engine, step_dir: Path) -> dict[Path, Any]:
    """What DeepSpeed saves of this step on this rank, path -> state. Nothing is written or copied. Collective."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, (collector := Collector())
    engine._copy_recovery_script = lambda folder: None  # which a full disk would end in an error on rank 0 alone
    engine.save_checkpoint(str(step_dir.parent), tag=step_dir.name, save_latest=False)
    engine.checkpoint_engine = usual
    return collector.files


def load_engine(engine: Engine, step_dir: Path) -> None:
    """Load what `files_to_save` named: weights, moments, loss scale. Adam's settings stay the run file's.

    Collective; for a step that a run of the same shape saved, else reshard.py. Raises UserError, on every rank and
    before anything is loaded, for a file that safe_pickle.py refuses.
    """
    together(lambda: check_pickles(pickles_of(step_dir)[rank() :: world_size()]))
    settings = [{key: group[key] for key in ADAM_SETTINGS} for group in engine.optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(step_dir.parent), tag=step_dir.name, load_lr_scheduler_states=False)
    assert loaded is not None, f"DeepSpeed found nothing to load in {step_dir}"  # it only warns
    for group, current in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(current)
