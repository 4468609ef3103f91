"""Choose how the engine recomputes activations: by torch or by deepspeed.checkpointing."""

import deepspeed
import torch
import torch._functorch.config

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.schema import MegaGPTConfig
from megagpt.errors import UserError
from megagpt.model.gpt import Recompute
from megagpt.model.recompute import RunAgain, recompute_blocks


def recompute_hook(cfg: MegaGPTConfig, ds: DeepSpeedConfig, device: torch.device, *, compiled: bool) -> Recompute:
    """Return how the model runs a block in training. Raises UserError for a setting without effect."""
    refuse_what_cannot_act(cfg, ds, device, compiled=compiled)
    recompute = cfg.recompute
    run_again = _deepspeed_checkpoint(ds) if recompute.kind == "deepspeed" else None
    return recompute_blocks(recompute, cfg.regularization.dropouts, run_again, compiled=compiled)


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


def refuse_what_cannot_act(cfg: MegaGPTConfig, ds: DeepSpeedConfig, device: torch.device, *, compiled: bool) -> None:
    """Raise UserError for a recomputation setting that would have no effect, or would change gradients."""
    recompute = cfg.recompute
    section = ds.activation_checkpointing
    asked = {key: value for key, value in section.model_dump().items() if value}
    if asked and (recompute.kind != "deepspeed" or recompute.policy == "none"):
        raise UserError(
            f"activation_checkpointing.{next(iter(asked))}={next(iter(asked.values()))} has no effect without "
            'DeepSpeed\'s checkpointing; set megagpt.recompute to {"policy": "full", "kind": "deepspeed"}'
        )
    if section.partition_activations or section.contiguous_memory_optimization:
        raise UserError(
            "activation_checkpointing.partition_activations and contiguous_memory_optimization split activations "
            "over model-parallel ranks, and megagpt has none; remove them"
        )
    if section.number_checkpoints is not None:
        raise UserError(
            f"activation_checkpointing.number_checkpoints={section.number_checkpoints} sizes the buffers of "
            "contiguous_memory_optimization, which needs model parallelism; choose blocks with megagpt.recompute"
        )
    for key, moves in (
        ("activation_checkpointing.cpu_checkpointing", section.cpu_checkpointing),
        ("megagpt.recompute.offload", recompute.offload),
    ):
        if moves and device.type == "cpu":
            raise UserError(f"{key} moves activations to the CPU, where they already are; remove it")
    if recompute.policy == "budget" and not compiled:
        raise UserError(
            "megagpt.recompute.policy='budget' acts in the compiler, and blocks are not compiled here; set "
            "megagpt.compile to true, or megagpt.recompute.policy to 'selective'"
        )
    rates = cfg.regularization
    if recompute.policy == "budget" and rates.dropouts.inside_blocks:  # torch 2.13 on a CPU: a gradient 18 % off
        own = {"attention_dropout": rates.attention_dropout, "residual_dropout": rates.residual_dropout}
        keys = {
            "dropout" if rate is None else key: rates.dropout if rate is None else rate for key, rate in own.items()
        }
        key, rate = next((key, rate) for key, rate in keys.items() if rate > 0.0)
        raise UserError(
            f"megagpt.recompute.policy='budget' with megagpt.regularization.{key}={rate}: the compiler may draw other "
            "masks in backward, and gradients would be wrong; set megagpt.recompute.policy to 'selective', or "
            f"megagpt.regularization.{key} to 0"
        )
