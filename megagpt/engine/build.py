"""Build the engine: from a RunConfig to a model wrapped by DeepSpeed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.sequence.layer import register_all_to_all_group
from torch import Tensor
from torch.optim import Optimizer

from megagpt.config.batch import BatchPlan
from megagpt.config.deepspeed import OptimizerParams
from megagpt.config.run_file import RunConfig
from megagpt.distributed.collectives import neighbors
from megagpt.distributed.process_group import rank
from megagpt.distributed.rank_variables import local_ranks
from megagpt.engine.activation_checkpointing import recompute_hook
from megagpt.engine.compilation import KERNELS, compile_blocks
from megagpt.engine.deepspeed_config import check_deepspeed_keys, effective_config
from megagpt.engine.ema import average_weights
from megagpt.engine.flat_tensors import clear_padding, param_sizes
from megagpt.engine.muon import place_matrices
from megagpt.engine.optimizer import build_optimizer, clips_itself, decay_groups
from megagpt.engine.without_compiler import without_compiler
from megagpt.errors import OwnRankError, UserError
from megagpt.model.attention import prefer_cudnn
from megagpt.model.gpt import GPT, Block
from megagpt.model.recompute import recompute_inside, set_memory_budget


def build_engine(
    run: RunConfig,
    batch: BatchPlan,
    vocab_size: int,
    device: torch.device,
    *,
    config: dict[str, Any] | None = None,
    compiled: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> Engine:
    """Build model, optimizer and ZeRO from the run file. Collective; raises UserError for what DeepSpeed refuses.

    `config`: DeepSpeed's part of the run file, if `effective_config` has computed it already.
    `compiled`: whether to compile the blocks, the same on every rank (`compilation.compiles` decides).
    `weights`: what the model begins with in place of random weights; rank 0's, the other ranks give an empty mapping.
    """
    # gloo does all that training needs: without this, a CPU rank compiles a shared-memory operator at its first start.
    # Set as a whole, for DeepSpeed makes the dict when it is first read, and tries the C compiler for that.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # ZeRO-3 asks after each reduction for the number of devices, and on a CPU that is not told it starts `numactl`
    os.environ.setdefault("LOCAL_SIZE", str(local_ranks()))
    deepspeed.init_distributed(verbose=False)
    cfg, ds = run.megagpt, run.deepspeed
    config = effective_config(run, batch, vocab_size, device) if config is None else config
    if clips_itself(ds):
        config = {**config, "gradient_clipping": 0.0}
    check_deepspeed_keys(config)
    sharing, sharded = batch.sequence_parallel_size, ds.zero_optimization.stage == 3
    exchange = all_to_all(sharing) if sharing > 1 else None
    recompute = recompute_hook(cfg, ds, device, compiled=compiled)
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    with _refusals_explained(), deepspeed.zero.Init(config_dict_or_path=config, enabled=sharded):
        model = GPT(cfg.model, vocab_size, cfg.regularization)
    if weights is not None:
        copy_weights(model, weights, sharded=sharded)
    if exchange is not None:
        model.shard_positions(exchange, sharing, rank() % sharing)
    if compiled:
        set_memory_budget(cfg.recompute)
        compile_blocks(model, cfg.out_dir / KERNELS, recompute_inside(cfg.recompute, cfg.regularization.dropouts))
        if sharded:
            deepspeed.utils.set_z3_leaf_modules(model, [Block])  # hooks inside a block would break its graph
    prefer_cudnn(device)
    model.recompute = recompute
    with _refusals_explained(), nullcontext() if compiled else without_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=optimizer_groups(model, run),
            optimizer=partial(build_optimizer, ds=ds, device=device),
            config=config,
        )
    _settle(engine, model, run)
    return engine


def _settle(engine: Engine, model: GPT, run: RunConfig) -> None:
    """Bring what DeepSpeed has built into the state in which a run begins."""
    ds = run.deepspeed
    groups = optimizer_groups(model, run)  # ZeRO has replaced the parameters in those that it was given
    clear_padding(engine, param_sizes(engine, groups))
    if ds.optimizer.type == "Muon":
        place_matrices(engine, groups)
    if run.megagpt.ema.decay is not None:
        average_weights(engine, run.megagpt.ema.decay)
    # DeepSpeed's own events are numbered by samples; ours, which hold the same, by steps. W&B would drop an event with
    # a lower number than the last one.
    engine.monitor.enabled = False
    if ds.zero_optimization.stage == 0 and ds.dtype != "fp32":
        # DeepSpeed lets Adam take a step of zero gradients to allocate its moments: undo its step count and its decay.
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


def optimizer_groups(model: GPT, run: RunConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters."""
    optimizer = run.deepspeed.optimizer
    momentum = optimizer.params.momentum if optimizer.type == "Muon" else None
    decay_on = run.megagpt.regularization.weight_decay_on
    scale = None if optimizer.params.lr_scale is None else optimizer.params.lr_scale.model_dump()
    return decay_groups(model, optimizer.params.weight_decay, decay_on, momentum=momentum, lr_scale=scale)


@torch.no_grad()
def copy_weights(model: GPT, weights: Mapping[str, Tensor], *, sharded: bool) -> None:
    """Copy rank 0's weights into the model, of as many positions as both have.

    At stage 3 (`sharded`) each rank gets its share here, one weight at a time; below it, DeepSpeed gives the model of
    rank 0 to all when it is initialized. Collective.
    """
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if weights:
                rows = min(len(parameter), len(weights[name]))
                parameter[:rows] = weights[name][:rows].to(parameter)


@contextmanager
def _refusals_explained() -> Iterator[None]:
    """Turn the errors by which DeepSpeed refuses a combination of keys, or stumbles over it, into a UserError.

    It refuses on every rank alike; what it stumbles over, such as a package, may be missing on one host alone.
    """
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"DeepSpeed refuses the run file: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, ImportError) as error:
        raise OwnRankError(f"DeepSpeed cannot start with this run file: {type(error).__name__}: {error}") from error


def all_to_all(size: int) -> Callable[[Tensor], Tensor]:
    """Return the exchange between `size` neighboring ranks that share each sample's positions (DeepSpeed-Ulysses).

    Source: Jacobs et al. 2023. The function sends x[p] of x (size, ...) to rank p, and is differentiable.
    DeepSpeed gets the size for its batch arithmetic, but no `mpu`: it partitions and averages over all ranks as it does
    without. Each rank's loss is the mean over its own targets, so that average is the gradient. (With its own
    parallel_state_sp as `mpu` it would divide by the number of groups, and add up gradient norms as if the ranks of a
    group held parts of a model.) Collective.
    """
    group = register_all_to_all_group(neighbors(size))

    def exchange(x: Tensor) -> Tensor:
        return torch.ops.deepspeed.dim_zero_all_to_all(x.contiguous(), group)  # differentiable, also when compiled

    return exchange


def set_step(
    engine: Engine,
    params: OptimizerParams,
    *,
    lr_factor: float,
    weight_decay_factor: float = 1.0,
    momentum: float | None = None,
) -> None:
    """Set what the next step's number decides: rates, weight decay, Muon's momentum. No scheduler has to be saved."""
    for group in engine.optimizer.param_groups:
        by_muon = "momentum" in group
        group["lr"] = lr_factor * (params.of_muon if by_muon else params.lr) * group.get("lr_scale", 1.0)
        if group["weight_decay"]:  # some groups have none
            group["weight_decay"] = weight_decay_factor * params.weight_decay
        if by_muon and momentum is not None:
            group["momentum"] = momentum


def set_accumulation(engine: Engine, micro_batches: int) -> None:
    """Let the next steps add up the gradients of `micro_batches` each. To be called between two steps."""
    if micro_batches == engine.gradient_accumulation_steps():
        return
    engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    # DeepSpeed finds the last micro-batch of a step by their number since the start, modulo those of a step.
    engine.micro_steps = 0


def learning_rates(engine: Engine) -> dict[str, float]:
    """Return the rates of the last step, without the factors of `lr_scale`: `lr`, and with Muon `muon_lr`."""
    groups = engine.optimizer.param_groups
    return {"muon_lr" if "momentum" in group else "lr": group["lr"] / group.get("lr_scale", 1.0) for group in groups}


def before_update(engine: Engine, act: Callable[[Optimizer, Tensor | float | None], None]) -> None:
    """Call act(optimizer, gradient norm over all ranks) whenever Adam is about to change weights.

    Under ZeRO that is once for each group of parameters, and never for a step that DeepSpeed skips itself: one whose
    norm is not finite, at stage 3, at stages 1 and 2 in fp32, at stage 0 in bf16, and always in fp16.
    """
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    inner.register_step_pre_hook(lambda optimizer, args, kwargs: act(optimizer, outer._global_grad_norm))
