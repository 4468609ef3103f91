"""The schema of a run file's sections against overfitting: "megagpt.regularization" and "megagpt.early_stopping"."""

from typing import Literal

from pydantic import Field, field_validator

from megagpt.config.parsing import Strict
from megagpt.options import MANY


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


class EarlyStoppingConfig(Strict):
    """Stop when the validation loss has not fallen by min_delta for `patience` evaluations in a row."""

    monitor: str = Field(
        default="val/loss",
        description="what decides: val/loss is then the mean over all validation sets, or with val/loss/NAME that of "
        "one; val/ema_loss and val/ema_loss/NAME are those of the averaged weights; loss/val is a former name",
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
