"""The configuration that DeepSpeed gets: the run file with what it leaves out filled by rule."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig as ConfigReader
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from megagpt.config.batch import BatchPlan
from megagpt.config.mistakes import explain
from megagpt.config.run_file import RunConfig
from megagpt.errors import UserError
from megagpt.model.flops import bucket_elements

# Sections that DeepSpeed does not get: optimizer.py, activation_checkpointing.py and train/ act on them.
KEPT_FROM_DEEPSPEED = {"optimizer", "activation_checkpointing", "tensorboard", "wandb", "csv_monitor"}


def check_deepspeed_keys(config: dict[str, Any]) -> None:
    """Let DeepSpeed check its own sections before the model takes memory; raises UserError with its reason."""
    try:
        ConfigReader(config)
    except ValidationError as error:
        wrong = error.errors()[0]["loc"][0]
        section = next((key for key, value in config.items() if isinstance(value, dict) and wrong in value), "")
        models = {model.__name__: model for model in DeepSpeedConfigModel.__subclasses__()}
        raise UserError(explain(error, models[error.title], section=section)) from error
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses the run file: {error}") from error
    except TypeError as error:  # it checks few types itself
        raise UserError(f"DeepSpeed cannot read the run file, as some value is of the wrong type: {error}") from error


def effective_config(run: RunConfig, batch: BatchPlan, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's part of the run file, with the keys that it leaves out filled by rule. Its own values stay."""
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
    """Return the keys that are filled where a run file leaves them out, with the reason for each value."""
    stage, on_host = run.deepspeed.zero_optimization.stage, run.deepspeed.uses_cpu_adam(device.type)
    bucket = bucket_elements(run.megagpt.model, vocab_size, batch.world_size)
    filled: dict[str, Any] = {
        "gradient_accumulation_steps": batch.accumulation,
        "timers.throughput.enabled": False,  # else the device is synchronized at every forward and step
        "steps_per_print": None,  # our monitor prints
    }
    if (run.deepspeed_raw.get("comet") or {}).get("enabled"):
        filled["comet.samples_log_interval"] = 1  # events are numbered by steps here
    if run.deepspeed.bf16.enabled:
        # A pass over all gradients, for DeepSpeed to skip a bad step: UpdateGate does that, but not with CPUAdam.
        filled["bf16.check_grad_overflow"] = on_host
    if stage > 0:
        # DeepSpeed's 5e8 elements would be gigabytes of buffer in one bucket, so that overlap_comm could hide nothing.
        filled["zero_optimization.reduce_bucket_size"] = bucket
        filled["zero_optimization.allgather_bucket_size"] = bucket
    if stage in (1, 2) and batch.world_size == 1:
        filled["zero_optimization.contiguous_gradients"] = False  # no peers, so no hooks and copies for them
    if run.deepspeed.zero_optimization.offload_optimizer.device != "none":
        filled["zero_force_ds_cpu_optimizer"] = on_host
    return filled
