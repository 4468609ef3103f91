"""The schema of a run file's "megagpt" section: frozen pydantic models, one for each part.

`run_file.py` turns a JSON file into a `RunConfig`. Code that gets one of these models does not check it again.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from megagpt.config.augmentation import AugmentConfig, PackingConfig
from megagpt.config.generation import GenerationConfig
from megagpt.config.guards import GuardsConfig
from megagpt.config.mistakes import as_written, did_you_mean
from megagpt.config.model import DEEPEST, LONGEST, ModelConfig
from megagpt.config.parsing import Strict, UserPath
from megagpt.config.validation_sets import ValidationSetConfig, ValidationSets
from megagpt.options import LARGEST, MANY


class WeightedDataset(Strict):
    """A dataset made by data_tools, and its weight in the mixture."""

    path: UserPath = Field(description="the folder of the dataset")
    weight: float = Field(default=1.0, gt=0.0, le=1e9, description="share of the samples, relative to other weights")


class DataConfig(Strict):
    """The datasets for training and validation."""

    train: tuple[WeightedDataset, ...] = Field(min_length=1, description="the datasets to train on, mixed by weight")
    val: ValidationSets = Field(
        description="the dataset whose validation split is measured, or several by name: "
        '{"web": {"path": "data/web"}, ...}'
    )
    val_tokens: int | None = Field(
        default=None, gt=0, le=LARGEST, description="tokens to validate on, of each dataset; null: all"
    )
    seed: int = Field(default=1234, ge=0, le=LARGEST, description="order of the training samples")
    seq_len: int | None = Field(
        default=None, gt=0, le=LONGEST, description="tokens per training example; null: megagpt.model.seq_len"
    )

    @property
    def folders(self) -> list[Path]:
        """The folders of all datasets."""
        return [*(one.path for one in self.train), *(one.path for one in self.val.values())]

    @model_validator(mode="after")
    def _all_or_no_validation_set_has_a_weight(self) -> Self:
        if lacking := [name for name, one in self.val.items() if one.weight is None]:
            given = [f"megagpt.data.val.{name}.weight" for name in self.val if name not in lacking]
            if given:
                raise ValueError(
                    f"{given[0]} is set and megagpt.data.val.{lacking[0]}.weight is not; give every set a weight, or "
                    "none for a mean over tokens"
                )
        return self


class ScheduleConfig(Strict):
    """The learning rate over steps, as a factor on the peak rate (`optimizer.params.lr`)."""

    max_steps: int = Field(gt=0, le=MANY, description="optimizer updates of the whole run")
    warmup_steps: int = Field(default=0, ge=0, le=MANY, description="first steps, over which the rate rises linearly")
    shape: Literal["cosine", "linear", "constant", "warmup-stable-decay"] = Field(
        default="cosine", description="of the curve after the warm-up"
    )
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0, description="last rate as a share of the peak")
    decay_steps: int | None = Field(
        default=None, gt=0, le=MANY, description="last steps, for warmup-stable-decay alone"
    )
    end_step: int | None = Field(
        default=None,
        gt=0,
        le=MANY,
        description="where the curve ends: its last rate holds from there on; null: megagpt.schedule.max_steps",
    )

    @property
    def curve_steps(self) -> int:
        """Number of steps over which the rate changes."""
        return self.end_step or self.max_steps

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if (self.decay_steps is not None) != (self.shape == "warmup-stable-decay"):
            raise ValueError(
                f"megagpt.schedule.decay_steps={as_written(self.decay_steps)} with "
                f"megagpt.schedule.shape={self.shape!r}; it is needed by 'warmup-stable-decay' and has no "
                "effect on the other shapes"
            )
        if self.warmup_steps + (self.decay_steps or 0) > self.curve_steps:
            last = f"megagpt.schedule.{'end_step' if self.end_step else 'max_steps'}={self.curve_steps}"
            parts = f"megagpt.schedule.warmup_steps={self.warmup_steps}"
            if self.decay_steps:
                parts += f" and megagpt.schedule.decay_steps={self.decay_steps} together"
            way_out = (
                "lower them" if self.decay_steps else f"set megagpt.schedule.warmup_steps={self.curve_steps // 10}"
            )
            raise ValueError(f"{parts} exceed {last}, the last step; {way_out}")
        return self


class RegularizationConfig(Strict):
    """Dropout, weight decay, label smoothing and z-loss (Chowdhery et al. 2022, PaLM, section 5)."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="on embeddings, attention and residuals")
    weight_decay_on: Literal["matrices", "all"] = Field(
        default="matrices", description="matrices: no biases and norms; all: every parameter"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of each target that is spread over the vocabulary"
    )
    z_loss: float = Field(default=0.0, ge=0.0, le=1e6, description="weight of the squared log partition function")


class MlflowConfig(Strict):
    """MLflow gets the metrics, by steps; needs the package mlflow. MLFLOW_TRACKING_URI names the server."""

    enabled: bool = Field(default=False, description="send metrics to MLflow")
    experiment: str = Field(default="megagpt", min_length=1, description="experiment of the run there")


class EarlyStoppingConfig(Strict):
    """Stop when the validation loss has not fallen by min_delta for `patience` evaluations in a row."""

    monitor: str = Field(
        default="val/loss",
        description="what decides: val/loss is then the mean over all validation sets, or with val/loss/NAME that of "
        "one; loss/val is a former name",
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="evaluations in a row without an improvement after which the run stops; 0: never",
    )
    min_delta: float = Field(
        default=0.0,
        ge=0.0,
        le=1e6,
        description="nats per token by which a loss must be lower than the best to be an improvement",
    )
    min_steps: int = Field(default=0, ge=0, le=MANY, description="evaluations before this step use no patience")
    restore_best: bool = Field(default=True, description="save at every improvement and end with the best weights")

    @field_validator("monitor")
    @classmethod
    def _by_todays_name(cls, monitor: str) -> str:
        return "val/loss" if monitor == "loss/val" else monitor


class EveryConfig(Strict):
    """Intervals in optimizer steps. 0 switches the action off (the last step always evaluates and saves)."""

    log: int = Field(default=10, ge=0, le=MANY, description="steps between lines of metrics")
    eval: int = Field(default=250, ge=0, le=MANY, description="steps between validations")
    save: int = Field(default=1000, ge=0, le=MANY, description="steps between checkpoints")
    sample: int = Field(default=0, ge=0, le=MANY, description="steps between generated texts")
    tasks: int = Field(default=0, ge=0, le=MANY, description="steps between runs of megagpt.tasks")


class KeepConfig(Strict):
    """Retention of checkpoints: after each save, a step is deleted unless one of these keeps it."""

    last: int = Field(default=2, ge=2, le=MANY, description="number of newest ones; two are verified before others go")
    every: int = Field(default=0, ge=0, le=MANY, description="keep steps that are multiples of this for ever; 0: none")
    best: int = Field(
        default=1,
        ge=1,
        le=MANY,
        description="number of those with the lowest validation loss, after the one that early stopping counts as best",
    )


class RecomputeConfig(Strict):
    """Activation checkpointing: which activations are dropped after forward and recomputed in backward."""

    policy: Literal["none", "selective", "every_k", "full", "budget"] = Field(
        default="none",
        description="none: keep all; selective: recompute all but attention and every second matrix product; every_k: "
        "recompute every k-th block; full: every block; budget: what the compiler chooses",
    )
    k: int | None = Field(default=None, gt=1, le=DEEPEST, description="every_k: blocks 0, k, 2k, ... are recomputed")
    budget: float | None = Field(default=None, ge=0.0, lt=1.0, description="budget: share of activations that is kept")
    kind: Literal["torch", "deepspeed"] = Field(
        default="torch", description="who recomputes; deepspeed reads activation_checkpointing"
    )
    offload: bool = Field(default=False, description="move the activations that blocks keep to host memory")

    @model_validator(mode="after")
    def _each_goes_with_its_policy(self) -> Self:
        policy = f"megagpt.recompute.policy={self.policy!r}"
        if (self.k is not None) != (self.policy == "every_k"):
            raise ValueError(
                f"megagpt.recompute.k={as_written(self.k)} with {policy}; set megagpt.recompute.k, a number such as 2, "
                "for policy 'every_k', and for no other"
            )
        if (self.budget is not None) != (self.policy == "budget"):
            raise ValueError(
                f"megagpt.recompute.budget={as_written(self.budget)} with {policy}; set megagpt.recompute.budget, a "
                "share such as 0.5, for policy 'budget', and for no other"
            )
        if self.kind == "deepspeed" and self.policy in ("selective", "budget"):
            raise ValueError(
                f"megagpt.recompute.kind='deepspeed' with {policy}; DeepSpeed recomputes whole blocks; remove "
                "megagpt.recompute.kind"
            )
        if self.offload and self.kind == "deepspeed":
            raise ValueError(
                "megagpt.recompute.offload is for megagpt.recompute.kind='torch'; DeepSpeed's is "
                "activation_checkpointing.cpu_checkpointing"
            )
        if self.offload and self.policy in ("selective", "budget"):
            raise ValueError(
                f"megagpt.recompute.offload with {policy}, whose kept tensors stay on the device; use it with 'full', "
                "'every_k' or 'none'"
            )
        return self

    def n_blocks(self, n_layer: int) -> int:
        """Return how many blocks recompute activations; none for "budget", where the compiler decides."""
        return 0 if self.policy in ("none", "budget") else -(-n_layer // (self.k or 1))


class MegaGPTConfig(Strict):
    """The "megagpt" section of a run file."""

    out_dir: UserPath = Field(description="the run's folder: checkpoints, metrics, TensorBoard")
    seed: int = Field(default=1234, ge=0, le=LARGEST, description="initial weights and dropout")
    init_from: UserPath | None = Field(
        default=None,
        description="a run (its best step), a step's folder, RUN/checkpoints/latest or what `megagpt import` or "
        "`average` made, whose weights a new run begins with",
    )
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    regularization: RegularizationConfig = RegularizationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    mlflow: MlflowConfig = MlflowConfig()
    every: EveryConfig = EveryConfig()
    keep: KeepConfig = KeepConfig()
    save_async: bool = Field(
        default=False, description="write checkpoints while training continues, from a copy of the state in host memory"
    )
    sample: GenerationConfig = GenerationConfig()
    tasks: tuple[str, ...] = Field(
        default=(),
        description="tasks of lm-evaluation-harness for megagpt.every.tasks: names, YAML files, folders of them",
    )
    recompute: RecomputeConfig = RecomputeConfig()
    compile: bool | None = Field(default=None, description="torch.compile for each block; null: only on CUDA")
    augment: AugmentConfig = AugmentConfig()
    packing: PackingConfig = PackingConfig()
    guards: GuardsConfig = GuardsConfig()
    time_limit_minutes: float | None = Field(default=None, gt=0, le=1e9, description="then save and exit with code 75")

    @model_validator(mode="after")
    def _examples_fit_the_model(self) -> Self:
        if self.seq_len > self.model.seq_len:
            raise ValueError(
                f"megagpt.data.seq_len={self.seq_len} is more than the model's positions, megagpt.model.seq_len="
                f"{self.model.seq_len}; lower it, or start a run with a longer megagpt.model.seq_len"
            )
        return self

    @model_validator(mode="after")
    def _steps_to_keep_are_saved(self) -> Self:
        kept, saved = self.keep.every, self.every.save
        if kept and (saved == 0 or kept % saved):
            raise ValueError(
                f"megagpt.keep.every={kept} is not a multiple of megagpt.every.save={saved}, so those steps are not "
                f"saved; set megagpt.keep.every to {max(saved, kept - kept % saved) if saved else 0}, or change "
                "megagpt.every.save"
            )
        return self

    @model_validator(mode="after")
    def _tasks_are_named(self) -> Self:
        if self.every.tasks and not self.tasks:
            raise ValueError(
                f"megagpt.every.tasks={self.every.tasks} with megagpt.tasks=[], which names none; set megagpt.tasks "
                'to a list such as ["my_tasks/"], or remove megagpt.every.tasks'
            )
        return self

    @model_validator(mode="after")
    def _what_decides_is_measured(self) -> Self:
        if not self.deciding_sets:
            monitor = self.early_stopping.monitor
            known = ["val/loss", *(f"val/loss/{name}" for name in self.data.val if name)]
            meant = did_you_mean(monitor if "/" in monitor else f"val/loss/{monitor}", known)
            raise ValueError(f"megagpt.early_stopping.monitor={as_written(monitor)} is not measured{meant}")
        return self

    @property
    def deciding_sets(self) -> dict[str, ValidationSetConfig]:
        """The validation sets that val/loss, and so the best step, is measured on: all, or the one that decides."""
        decides = self.early_stopping.monitor
        return {name: one for name, one in self.data.val.items() if decides in ("val/loss", f"val/loss/{name}")}

    @property
    def seq_len(self) -> int:
        """Tokens per training example, at most as many as the model has positions."""
        return self.data.seq_len or self.model.seq_len
