"""The schema of a run file's "megagpt" section: frozen pydantic models, one for each part.

`run_file.py` turns a JSON file into a `RunConfig`. Code that gets one of these models does not check it again.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from megagpt.config.augmentation import AugmentConfig, PackingConfig
from megagpt.config.doubling import check_doubles
from megagpt.config.generation import GenerationConfig
from megagpt.config.guards import GuardsConfig
from megagpt.config.mistakes import as_written, did_you_mean
from megagpt.config.model import LONGEST, ModelConfig
from megagpt.config.parsing import Strict, UserPath
from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import EarlyStoppingConfig, RegularizationConfig
from megagpt.config.schedule import ScheduleConfig
from megagpt.config.validation_sets import ValidationSetConfig, ValidationSets
from megagpt.options import LARGEST, MANY

LOSS, EMA_LOSS = "val/loss", "val/ema_loss"


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


class MlflowConfig(Strict):
    """MLflow gets the metrics, by steps; needs the package mlflow. MLFLOW_TRACKING_URI names the server."""

    enabled: bool = Field(default=False, description="send metrics to MLflow")
    experiment: str = Field(default="megagpt", min_length=1, description="experiment of the run there")


class EveryConfig(Strict):
    """Intervals in optimizer steps. 0 switches the action off (the last step always evaluates and saves)."""

    log: int = Field(default=10, ge=0, le=MANY, description="steps between lines of metrics")
    eval: int = Field(default=250, ge=0, le=MANY, description="steps between validations")
    save: int = Field(default=1000, ge=0, le=MANY, description="steps between checkpoints")
    sample: int = Field(default=0, ge=0, le=MANY, description="steps between generated texts")
    tasks: int = Field(default=0, ge=0, le=MANY, description="steps between runs of megagpt.tasks")


class EmaConfig(Strict):
    """An exponential moving average of the weights, in fp32, sharded as Adam's moments: val/ema_loss is its loss."""

    decay: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="share of the average that an update leaves, such as 0.999; after n updates at most (1 + n) / "
        "(10 + n); null: no average",
    )


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
    ema: EmaConfig = EmaConfig()
    noise_scale: bool = Field(
        default=False,
        description="log the gradient noise scale (McCandlish et al. 2018), the batch in sequences above which a "
        "larger one gains less",
    )
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
    time_limit_minutes: float | None = Field(
        default=None, gt=0, le=1e9, description="minutes until it saves and exits with 75"
    )

    @model_validator(mode="after")
    def _examples_fit_the_model(self) -> Self:
        if self.seq_len > self.model.seq_len:
            raise ValueError(
                f"megagpt.data.seq_len={self.seq_len} is more than the model's positions, megagpt.model.seq_len="
                f"{self.model.seq_len}; lower it, or start a run with a longer megagpt.model.seq_len"
            )
        return self

    @model_validator(mode="after")
    def _short_rows_double_to_whole_ones(self) -> Self:
        whole = "megagpt.model.seq_len" if self.data.seq_len is None else "megagpt.data.seq_len"
        check_doubles(
            ("megagpt.schedule.first_seq_len", self.schedule.first_seq_len),
            (whole, self.seq_len),
            "megagpt.schedule.seq_len_warmup_steps",
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
            losses = [LOSS, EMA_LOSS] if self.ema.decay is not None else [LOSS]
            known = [loss + name for loss in losses for name in ("", *(f"/{one}" for one in self.data.val if one))]
            meant = did_you_mean(monitor if "/" in monitor else f"{LOSS}/{monitor}", known)
            if self.average_decides and self.ema.decay is None:
                meant = " without averaged weights; set megagpt.ema.decay, for example to 0.999"
            raise ValueError(f"megagpt.early_stopping.monitor={as_written(monitor)} is not measured{meant}")
        return self

    @model_validator(mode="after")
    def _gap_is_between_equal_losses(self) -> Self:
        if self.early_stopping.max_gap is None:
            return self
        others = {
            "megagpt.regularization.label_smoothing": self.regularization.label_smoothing,
            "megagpt.regularization.z_loss": self.regularization.z_loss,
            "megagpt.augment.span_corruption.rate": self.augment.span_corruption.rate,
            "megagpt.augment.fim.rate": self.augment.fim.rate,
        }
        if changed := {key: value for key, value in others.items() if value}:
            seen = " and ".join(f"{key}={value:g}" for key, value in changed.items())
            raise ValueError(
                f"megagpt.early_stopping.max_gap={self.early_stopping.max_gap:g} compares the validation loss with the "
                f"training loss, which with {seen} is another loss or of another text; remove "
                f"megagpt.early_stopping.max_gap, or set {' '.join(f'{key}=0' for key in changed)}"
            )
        return self

    @property
    def deciding_sets(self) -> dict[str, ValidationSetConfig]:
        """The validation sets that val/loss, and so the best step, is measured on: all, or the one that decides."""
        loss, decides = EMA_LOSS if self.average_decides else LOSS, self.early_stopping.monitor
        if self.average_decides and self.ema.decay is None:
            return {}
        return {name: one for name, one in self.data.val.items() if decides in (loss, f"{loss}/{name}")}

    @property
    def average_decides(self) -> bool:
        """Tell whether the loss of the averaged weights decides which step is the best."""
        return self.early_stopping.monitor.startswith(EMA_LOSS)

    @property
    def seq_len(self) -> int:
        """Tokens per training example, at most as many as the model has positions."""
        return self.data.seq_len or self.model.seq_len
