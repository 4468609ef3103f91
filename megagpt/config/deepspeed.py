"""Typed models of the DeepSpeed keys that decide something in megagpt too. All others go to DeepSpeed as written."""

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from megagpt.config.parsing import Checked, Strict
from megagpt.options import LARGEST

FLOAT32 = 3e38  # the largest numbers of a float32, roughly
MOST = 10**9  # sequences of a batch, ranks
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _factor(what: str) -> Any:
    return Field(default=1.0, gt=0.0, le=1e6, description=f"factor on the learning rate of {what}")


class LrScale(Strict):
    """Factors on optimizer.params.lr for what is no matrix inside a block."""

    embeddings: float = _factor("the embeddings of tokens, with a tied head, and of positions")
    head: float = _factor("an output head of its own")
    vectors: float = _factor("biases and norms")
    scalars: float = _factor("the scalars of megagpt.model.value_residual and megagpt.model.embedding_shortcut")


class OptimizerParams(Strict):
    """Adam's settings, and Muon's."""

    lr: float = Field(gt=0.0, le=FLOAT32, description="peak learning rate; megagpt.schedule varies it")
    muon_lr: float | None = Field(
        default=None, gt=0.0, le=FLOAT32, description="peak rate of what Muon updates, a step of Adam's size; null: lr"
    )
    lr_scale: LrScale | None = Field(
        default=None, description="factors on lr; cannot be added to a run, or removed, when it is resumed; null: none"
    )
    momentum: Beta = Field(default=0.95, description="Muon's Nesterov momentum")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="decay rates of Adam's two moments")
    eps: float = Field(default=1e-8, ge=1e-30, le=FLOAT32, description="added to the denominator")
    weight_decay: float = Field(
        default=0.0, ge=0.0, le=FLOAT32, description="on what megagpt.regularization.weight_decay_on names"
    )
    cautious_weight_decay: bool = Field(
        default=False, description="only weights that the update brings closer to zero decay (Chen et al. 2025)"
    )
    torch_adam: bool = Field(default=False, description="offload from a GPU: torch's Adam, not CPUAdam")
    adam_w_mode: bool = Field(default=True, description="decoupled weight decay, for type Adam")

    @property
    def of_muon(self) -> float:
        """The peak learning rate of what Muon updates."""
        return self.lr if self.muon_lr is None else self.muon_lr


class OptimizerConfig(Strict):
    """Adam; AdamW (Loshchilov and Hutter 2019), which always decouples weight decay from the gradient; or Muon.

    Muon (Jordan et al. 2024) updates the matrices inside the blocks, AdamW everything else.
    """

    type: Literal["AdamW", "Adam", "Muon"] = Field(
        default="AdamW",
        description="AdamW decouples weight decay; Muon is for the blocks' matrices, AdamW for the rest",
    )
    params: OptimizerParams

    @model_validator(mode="after")
    def _settings_are_of_the_type(self) -> Self:
        of_others = {"torch_adam", "adam_w_mode"} if self.type == "Muon" else {"muon_lr", "momentum"}
        for key in sorted(of_others & self.params.model_fields_set):
            if getattr(self.params, key) != OptimizerParams.model_fields[key].default:
                kind = "Adam" if self.type == "Muon" else "Muon"
                raise ValueError(
                    f"params.{key}={getattr(self.params, key)} is for type {kind}, and type is {self.type!r}; remove "
                    f"optimizer.params.{key}, or set optimizer.type to {kind!r}"
                )
        return self

    @model_validator(mode="after")
    def _cautious_decay_is_decoupled(self) -> Self:
        if self.params.cautious_weight_decay and self.type == "Adam" and not self.params.adam_w_mode:
            raise ValueError(
                "params.cautious_weight_decay=true does not work with optimizer.params.adam_w_mode=false, whose "
                "decay is a part of the gradient; remove one of the two"
            )
        return self


class ActivationCheckpointingConfig(Strict):
    """DeepSpeed's section, read when megagpt.recompute.kind is "deepspeed"."""

    partition_activations: bool = Field(default=False, description="divide kept activations over model-parallel ranks")
    cpu_checkpointing: bool = Field(default=False, description="keep activations in host memory")
    contiguous_memory_optimization: bool = Field(default=False, description="keep activations in one buffer")
    number_checkpoints: int | None = Field(
        default=None, gt=0, le=MOST, description="blocks for which that buffer has room"
    )
    synchronize_checkpoint_boundary: bool = Field(default=False, description="synchronize the device after each block")
    profile: bool = Field(default=False, description="print the time of each block")


class TensorboardConfig(Strict):
    """TensorBoard's events go to out_dir, or to a folder of its name in output_path."""

    enabled: bool = Field(default=True, description="write curves and samples for TensorBoard")
    output_path: str = Field(default="", description="other folder for the events, which gets one for each run")
    job_name: str = Field(default="", description="name of the run's folder there, or of a folder in megagpt.out_dir")


class WandbConfig(Strict):
    """Weights & Biases gets the metrics, by steps; needs the package wandb."""

    enabled: bool = Field(default=False, description="send metrics to Weights & Biases")
    project: str = Field(default="megagpt", description="project of the run there")
    group: str | None = Field(default=None, description="group of runs there")
    team: str | None = Field(default=None, description="team or user there; null: yours")


class CsvConfig(Strict):
    """A CSV file for each metric, in megagpt.out_dir/csv, or in a folder of the run's name in output_path."""

    enabled: bool = Field(default=False, description="write CSV files")
    output_path: str = Field(default="", description="other folder for the files, which gets one for each run")
    job_name: str = Field(default="", description="name of the run's folder there, or of a folder in megagpt.out_dir")


class Passed(Checked):
    """A section of which only the keys below decide something here; DeepSpeed gets and checks all of it."""

    model_config = ConfigDict(extra="allow")


class Enabled(Passed):
    """A section of which megagpt reads only whether it is on."""

    enabled: bool = Field(default=False, description="switch the section on")


class Fp16Config(Enabled):
    """Training in fp16 with a loss scale."""

    loss_scale: float = Field(default=0.0, ge=0.0, le=FLOAT32, description="0: adjusted while training")


class OffloadConfig(Passed):
    """The place outside of the GPU where ZeRO keeps optimizer states, or parameters."""

    device: Literal["none", "cpu", "nvme"] = Field(default="none", description="none keeps all on the GPU")


def _stage_3(name: str, default: int, what: str) -> Any:
    """Return a number that only ZeRO stage 3 reads; DeepSpeed takes it with the prefix `stage3_` too."""
    return Field(
        default=default,
        ge=0,
        le=LARGEST,
        validation_alias=AliasChoices(name, f"stage3_{name}"),
        description=f"stage 3: {what}",
    )


class ZeroConfig(Passed):
    """ZeRO's stage, and what planning memory and communication depends on. The defaults are DeepSpeed's."""

    stage: int = Field(
        default=0, ge=0, le=3, description="what is sharded: 0 nothing, 1 moments, 2 also gradients, 3 also weights"
    )
    offload_optimizer: OffloadConfig = OffloadConfig()
    offload_param: OffloadConfig = OffloadConfig()
    overlap_comm: bool | None = Field(default=None, description="null: at stage 3 alone")
    reduce_bucket_size: int | None = Field(
        default=None, ge=0, le=LARGEST, description="elements; null: by the model's size"
    )
    sub_group_size: int = Field(
        default=1_000_000_000, ge=0, le=LARGEST, description="stage 3: elements that are updated at a time"
    )
    param_persistence_threshold: int = _stage_3(
        "param_persistence_threshold", 100_000, "parameters of fewer elements are not sharded"
    )
    prefetch_bucket_size: int = _stage_3("prefetch_bucket_size", 50_000_000, "elements that are fetched ahead")
    max_reuse_distance: int = _stage_3(
        "max_reuse_distance", 1_000_000_000, "a parameter used again within this many elements is kept"
    )

    zero_hpz_partition_size: int = Field(
        default=1,
        ge=0,
        le=MOST,
        description="stage 3: ranks, as many as a host has, that keep a second copy of all weights to gather from",
    )

    def secondary_ranks(self, world_size: int) -> int:
        """Return the number of ranks that a secondary partition of weights (hpZ) is on; 1: there is none."""
        return max(1, min(self.zero_hpz_partition_size, world_size)) if self.stage == 3 else 1

    @property
    def overlaps(self) -> bool:
        """Tell whether gradients, and at stage 3 weights, are sent while the GPU computes."""
        return self.stage > 0 and (self.stage == 3 if self.overlap_comm is None else self.overlap_comm)

    @model_validator(mode="after")
    def _parameters_are_offloaded_at_stage_3(self) -> Self:
        if self.offload_param.device != "none" and self.stage != 3:
            raise ValueError(
                f"zero_optimization.offload_param has no effect at zero_optimization.stage={self.stage}; set "
                "zero_optimization.stage to 3, or remove it"
            )
        return self


class DeepSpeedConfig(Passed):
    """The top level of a run file, without the "megagpt" section."""

    train_batch_size: int = Field(
        gt=0, le=MOST, description="sequences of a step over all ranks, on any number of them"
    )
    train_micro_batch_size_per_gpu: int = Field(gt=0, le=MOST, description="sequences of one forward pass on a rank")
    gradient_accumulation_steps: int | None = Field(
        default=None, gt=0, le=MOST, description="micro-batches of a step; left out: as the batch sizes need"
    )
    gradient_clipping: float = Field(
        default=1.0, ge=0.0, le=FLOAT32, description="largest norm of the gradient; 0: no limit"
    )
    sequence_parallel_size: int = Field(
        default=1, gt=0, le=MOST, description="neighboring ranks that share each sample"
    )
    communication_data_type: str | None = Field(default=None, description="of reduced gradients; null: the weights'")
    prescale_gradients: bool = Field(default=False, description="divide gradients before they are summed over ranks")
    optimizer: OptimizerConfig
    bf16: Enabled = Enabled()
    fp16: Fp16Config = Fp16Config()
    zero_optimization: ZeroConfig = ZeroConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CsvConfig = CsvConfig()

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """The dtype of the model's computation."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"

    @model_validator(mode="after")
    def _muon_has_its_matrices_on_the_gpu(self) -> Self:
        for name in ("offload_optimizer", "offload_param") if self.optimizer.type == "Muon" else ():
            if (device := getattr(self.zero_optimization, name).device) != "none":
                raise ValueError(
                    f"zero_optimization.{name}.device={device!r} does not work with optimizer.type='Muon', which "
                    f"multiplies matrices in each update; remove zero_optimization.{name}, or set optimizer.type to "
                    "'AdamW'"
                )
        return self

    @model_validator(mode="after")
    def _cautious_decay_is_of_torchs_adam(self) -> Self:
        params, device = self.optimizer.params, self.zero_optimization.offload_optimizer.device
        if params.cautious_weight_decay and device != "none" and not params.torch_adam:
            raise ValueError(
                f"optimizer.params.cautious_weight_decay=true does not work with zero_optimization.offload_optimizer."
                f"device={device!r} and DeepSpeed's CPUAdam, which always decays all weights; set "
                "optimizer.params.torch_adam to true, or remove one of the two"
            )
        return self

    def uses_cpu_adam(self, device_type: str) -> bool:
        """Tell whether DeepSpeed's CPUAdam updates the weights of a device, "cpu" or "cuda"; torch's Adam otherwise."""
        offloads = self.zero_optimization.offload_optimizer.device != "none"
        return offloads and device_type == "cuda" and not self.optimizer.params.torch_adam
