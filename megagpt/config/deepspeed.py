"""DeepSpeed's part of the run file: the keys that decide something here too, and which keys there are."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megagpt.config.parsing import Strict


class OptimizerParams(Strict):
    lr: float = Field(gt=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    torch_adam: bool = Field(default=False, description="offload from a GPU: torch's Adam, not CPUAdam")
    adam_w_mode: bool = Field(default=True, description="decoupled weight decay, for type Adam")


class OptimizerConfig(Strict):
    type: Literal["AdamW", "Adam"] = "AdamW"
    params: OptimizerParams


class ActivationCheckpointingConfig(Strict):
    """DeepSpeed's section, read when megagpt.recompute.kind is "deepspeed"."""

    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = Field(default=None, gt=0)
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


class TensorboardConfig(Strict):
    """Where TensorBoard's events go: output_path/job_name; without output_path, out_dir/tensorboard."""

    enabled: bool = True
    output_path: str = ""
    job_name: str = "tensorboard"


class Enabled(BaseModel):
    """A DeepSpeed section of which we read only whether it is on; DeepSpeed checks the rest."""

    model_config = ConfigDict(extra="allow", frozen=True)
    enabled: bool = False


class OffloadConfig(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    device: Literal["none", "cpu", "nvme"] = "none"


class ZeroConfig(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    stage: int = Field(default=0, ge=0, le=3)
    offload_optimizer: OffloadConfig = OffloadConfig()
    offload_param: OffloadConfig = OffloadConfig()

    @model_validator(mode="after")
    def _parameters_are_offloaded_at_stage_3(self) -> Self:
        if self.offload_param.device != "none" and self.stage != 3:
            raise ValueError(f"offload_param has no effect at stage={self.stage}; set stage to 3 or remove it")
        return self


class DeepSpeedConfig(BaseModel):
    """The DeepSpeed keys that decide something here too. All others pass through to DeepSpeed as written."""

    model_config = ConfigDict(extra="allow", frozen=True)
    train_batch_size: int = Field(gt=0)
    train_micro_batch_size_per_gpu: int = Field(gt=0)
    gradient_accumulation_steps: int | None = Field(default=None, gt=0)
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    sequence_parallel_size: int = Field(default=1, gt=0, description="neighboring ranks that share each sample")
    optimizer: OptimizerConfig
    bf16: Enabled = Enabled()
    fp16: Enabled = Enabled()
    zero_optimization: ZeroConfig = ZeroConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"


# DeepSpeed ignores a misspelt key at the top level, so the keys it reads there are listed here.
# tests/config/test_run_file.py derives the same list from the installed DeepSpeed.
DEEPSPEED_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "sequence_parallel_size",
        "steps_per_print",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

# Its sections that are plain dictionaries ignore a misspelt key too; the typed ones refuse it themselves.
DEEPSPEED_SECTIONS = {
    "aio": {"block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds"},
    "data_types": {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"},
    "flops_profiler": {
        *("detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor", "top_modules"),
    },
    "timers": {"throughput"},
    "torch_autocast": {"dtype", "enabled", "lower_precision_safe_modules"},
}

# Keys that DeepSpeed reads but that could not act here: refused with the reason instead of ignored.
_DATA_PARALLEL = "megagpt is data and sequence parallel only; remove it"

_OWN_CHECKPOINTS = "megagpt commits checkpoints itself; see megagpt.every.save"

_OWN_DATA = "megagpt brings its own sampler; see megagpt.data"

REFUSED_KEYS = {
    "autotuning": "sizes are chosen by hand; remove it",
    "bfloat16": 'write "bf16"',
    "checkpoint": _OWN_CHECKPOINTS,
    "compile": "blocks are compiled by torch; see megagpt.compile",
    "curriculum_learning": _OWN_DATA,
    "data_efficiency": _OWN_DATA,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "expert_parallel": _DATA_PARALLEL,
    "hybrid_engine": "it is for RLHF; remove it",
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed's default; remove it",
    "pipeline": _DATA_PARALLEL,
    "scheduler": "the learning rate comes from megagpt.schedule",
    "seq_parallel_communication_data_type": "gradients are reduced over all ranks alike; see communication_data_type",
    "tensor_parallel": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": _DATA_PARALLEL,
    "weight_quantization": "it is for inference; remove it",
}
