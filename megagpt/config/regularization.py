"""The schema of a run file's sections against overfitting: "megagpt.regularization" and "megagpt.early_stopping"."""

from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from megagpt.config.parsing import Strict
from megagpt.options import LARGEST, MANY


class Dropout(NamedTuple):
    """The dropout rates of a model's parts."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0

    @property
    def inside_blocks(self) -> bool:
        """Tell whether blocks draw random numbers."""
        return max(self.attention, self.residual) > 0.0


NO_DROPOUT = Dropout()


class RegularizationConfig(Strict):
    """Dropout, stochastic depth, weight decay, label smoothing and z-loss (Chowdhery et al. 2022, PaLM, section 5)."""

    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="probability, on embeddings, attention and residuals that have no rate of their own",
    )
    embedding_dropout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="probability, on the embeddings' sum; null: megagpt.regularization.dropout",
    )
    attention_dropout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="probability, on attention weights; null: megagpt.regularization.dropout",
    )
    residual_dropout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="probability, on what attention and MLP add to the residuals; null: megagpt.regularization.dropout",
    )
    stochastic_depth: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of the samples that skip the last block in training (Huang et al. 2016)",
    )
    stochastic_depth_shape: Literal["linear", "constant"] = Field(
        default="linear", description="linear: block i of L is skipped by i / L of that share; constant: by all of it"
    )
    weight_decay_on: Literal["matrices", "all"] = Field(
        default="matrices", description="matrices: no biases and norms; all: every parameter"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of each target that is spread over the vocabulary"
    )
    z_loss: float = Field(default=0.0, ge=0.0, le=1e6, description="weight of the squared log partition function")

    @property
    def dropouts(self) -> Dropout:
        """The dropout rates of the model's parts."""
        return Dropout(*(self.dropout if rate is None else rate for rate in self.own_dropouts))

    @property
    def own_dropouts(self) -> tuple[float | None, float | None, float | None]:
        """The rates of embeddings, attention and residuals that are given for them alone."""
        return self.embedding_dropout, self.attention_dropout, self.residual_dropout

    def skip_rates(self, n_layer: int) -> tuple[float, ...]:
        """Return for each block the share of the samples that skip it (Huang et al. 2016, equation 4)."""
        linear = self.stochastic_depth_shape == "linear"
        return tuple(self.stochastic_depth * (i / n_layer if linear else 1.0) for i in range(1, n_layer + 1))


UNREGULARIZED = RegularizationConfig()


class EarlyStoppingConfig(Strict):
    """Stop when the validation loss has not fallen by min_delta for `patience` evaluations in a row.

    Or when it is too far above the training loss.
    """

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
    patience_tokens: int | None = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="training tokens without an improvement after which the run stops, in place of "
        "megagpt.early_stopping.patience",
    )
    smoothing: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="number of last evaluations whose median decides when to stop; the best step is that of the "
        "lowest loss all the same",
    )
    max_gap: float | None = Field(
        default=None,
        ge=0.0,
        le=1e6,
        description="nats per token: the run also stops when the validation loss was more than this above the "
        "training loss, as its mean over the steps since the evaluation before, for as long as patience says, or once "
        "without patience",
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

    @model_validator(mode="after")
    def _patience_has_one_unit(self) -> Self:
        if self.patience and self.patience_tokens is not None:
            raise ValueError(
                f"megagpt.early_stopping.patience={self.patience} counts evaluations, and "
                f"megagpt.early_stopping.patience_tokens={self.patience_tokens} tokens; remove one of the two"
            )
        return self

    @property
    def stops(self) -> bool:
        """Tell whether anything stops the run early."""
        return self.patience > 0 or self.patience_tokens is not None or self.max_gap is not None
