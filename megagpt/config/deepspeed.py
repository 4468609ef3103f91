"""A run: our section of its file, the DeepSpeed keys that we read too, and how batches multiply out."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megagpt.config.schema import MegaGPTConfig, Strict
from megagpt.errors import UserError


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


@dataclass(frozen=True)
class RunConfig:
    """A run file, parsed: our section, our view of DeepSpeed's keys, and those keys exactly as written.

    Raises ValueError for settings of the two that do not go together.
    """

    megagpt: MegaGPTConfig
    deepspeed: DeepSpeedConfig
    deepspeed_raw: dict[str, Any]

    def __post_init__(self) -> None:
        cfg, P = self.megagpt, self.deepspeed.sequence_parallel_size
        shared = {"model.n_head": cfg.model.n_head, "model.seq_len": cfg.model.seq_len, "data.seq_len": cfg.seq_len}
        common = math.gcd(*shared.values())
        for name, n in shared.items():
            if n % P:
                raise ValueError(
                    f"sequence_parallel_size={P} does not divide megagpt.{name}={n}, and so many ranks share heads and "
                    f"positions evenly; set it to {max(p for p in range(1, P) if common % p == 0)}, or change {name}"
                )

    def as_json(self) -> dict[str, Any]:
        """The run file again, with our section's defaults written out."""
        return {**self.deepspeed_raw, "megagpt": self.megagpt.model_dump(mode="json")}


# --- batch arithmetic -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """global_batch = micro_batch x accumulation x replicas, all in sequences."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int
    sequence_parallel_size: int = 1

    @property
    def replicas(self) -> int:
        """How many ranks, or groups of ranks that share their samples' positions, see samples of their own."""
        return self.world_size // self.sequence_parallel_size


def batch_plan(ds: DeepSpeedConfig, world_size: int) -> BatchPlan:
    """Accumulation follows from the global batch, which is the same on any number of ranks.

    Raises UserError, with the number to set, when the sizes do not multiply out.
    """
    total, micro, accum = (
        ds.train_batch_size,
        ds.train_micro_batch_size_per_gpu,
        ds.gradient_accumulation_steps,
    )
    shared_by = ds.sequence_parallel_size
    if world_size % shared_by:
        raise UserError(
            f"sequence_parallel_size={shared_by} does not divide the number of ranks, {world_size}; "
            f"set it to {math.gcd(shared_by, world_size)}, or start a multiple of {shared_by} ranks"
        )
    replicas = world_size // shared_by
    per_pass = micro * replicas
    ranks = f"{replicas} {'rank' if shared_by == 1 else 'group'}{'s' if replicas > 1 else ''}"
    if shared_by > 1:
        ranks += f" of {shared_by} ranks (sequence_parallel_size)"
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise UserError(
            f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} "
            f"= {per_pass}; set train_batch_size to {nearest}, or another micro-batch"
        )
    if accum is not None and accum * per_pass != total:
        raise UserError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accum} x {ranks} = {accum * per_pass}; "
            f"set gradient_accumulation_steps to {total // per_pass}, or leave it out"
        )
    return BatchPlan(total, micro, total // per_pass, world_size, shared_by)
