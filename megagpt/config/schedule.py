"""The schema of a run file's "megagpt.schedule" section."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megagpt.config.doubling import Doubling, doubling
from megagpt.config.mistakes import as_written
from megagpt.config.parsing import Strict
from megagpt.options import LARGEST, MANY


class ScheduleConfig(Strict):
    """The learning rate over steps, as a factor on the peak rate (`optimizer.params.lr`), and what goes with it."""

    max_steps: int = Field(gt=0, le=MANY, description="optimizer updates of the whole run")
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="tokens of the whole run in place of megagpt.schedule.max_steps, rounded up to whole steps",
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="epochs of the training dataset in place of megagpt.schedule.max_steps, also parts of one, rounded "
        "up to whole steps",
    )
    warmup_steps: int = Field(default=0, ge=0, le=MANY, description="first steps, over which the rate rises linearly")
    shape: Literal["cosine", "linear", "inverse-sqrt", "constant", "warmup-stable-decay", "range-test"] = Field(
        default="cosine",
        description="of the curve after the warm-up; inverse-sqrt: peak * sqrt(megagpt.schedule.warmup_steps / step); "
        "range-test: rises from megagpt.schedule.min_lr_ratio to the peak",
    )
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0, description="last rate as a share of the peak")
    decay_steps: int | None = Field(
        default=None, gt=0, le=MANY, description="last steps, for warmup-stable-decay alone"
    )
    decay_from: int | None = Field(
        default=None,
        ge=0,
        le=MANY,
        description="step after which warmup-stable-decay falls, in place of megagpt.schedule.decay_steps: for a run "
        "that is resumed to decay",
    )
    end_step: int | None = Field(
        default=None,
        gt=0,
        le=MANY,
        description="where the curve ends: its last rate holds from there on; null: megagpt.schedule.max_steps",
    )
    weight_decay_shape: Literal["constant", "linear", "lr"] = Field(
        default="constant", description="over steps: linear: falls to 0; lr: with the learning rate's factor"
    )
    momentum_warmup_steps: int = Field(
        default=0, ge=0, le=MANY, description="first steps, over which Muon's momentum rises from 0.85"
    )
    seq_len_warmup_steps: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="first steps, in which each row is read as several shorter ones, whose length doubles from "
        "megagpt.schedule.first_seq_len to the whole row",
    )
    first_seq_len: int | None = Field(
        default=None,
        gt=0,
        le=MANY,
        description="length of the rows at first, with megagpt.schedule.seq_len_warmup_steps",
    )
    batch_ramp_steps: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="first steps, in which the global batch doubles from megagpt.schedule.first_batch to "
        "train_batch_size",
    )
    first_batch: int | None = Field(
        default=None, gt=0, le=MANY, description="global batch at first, with megagpt.schedule.batch_ramp_steps"
    )

    def batches(self, train_batch_size: int) -> Doubling:
        """Return the global batch of each step."""
        return doubling(self.batch_ramp_steps, self.first_batch or train_batch_size, train_batch_size)

    def rows(self, seq_len: int) -> Doubling:
        """Return the length of the rows of each step (Li et al. 2022)."""
        return doubling(self.seq_len_warmup_steps, self.first_seq_len or seq_len, seq_len)

    @property
    def curve_steps(self) -> int:
        """Number of steps over which the rate changes."""
        return self.end_step or self.max_steps

    @property
    def length(self) -> tuple[str, float]:
        """Return the key that a user changes for a longer run, and its value."""
        if self.max_epochs is not None:
            return "megagpt.schedule.max_epochs", self.max_epochs
        if self.max_tokens is not None:
            return "megagpt.schedule.max_tokens", self.max_tokens
        return "megagpt.schedule.max_steps", self.max_steps

    @model_validator(mode="after")
    def _what_doubles_has_a_beginning_and_an_end(self) -> Self:
        for first, steps, whole in (
            ("first_seq_len", "seq_len_warmup_steps", "rows"),
            ("first_batch", "batch_ramp_steps", "batches"),
        ):
            begin, n = getattr(self, first), getattr(self, steps)
            if (begin is None) != (n == 0):
                raise ValueError(
                    f"megagpt.schedule.{first}={as_written(begin)} with megagpt.schedule.{steps}={n}: the two belong "
                    "together; set both, or remove both"
                )
            if n > self.max_steps:
                raise ValueError(
                    f"megagpt.schedule.{steps}={n} is more than megagpt.schedule.max_steps={self.max_steps}, so no "
                    f"step would read whole {whole}; set megagpt.schedule.{steps} to {max(1, self.max_steps // 4)}"
                )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        decays = self.shape == "warmup-stable-decay"
        if self.decay_from is not None and (self.decay_steps is not None or not decays):
            with_what = f"shape={self.shape!r}" if not decays else f"decay_steps={self.decay_steps}"
            raise ValueError(
                f"megagpt.schedule.decay_from={self.decay_from} with megagpt.schedule.{with_what}; it is for "
                "'warmup-stable-decay', in place of megagpt.schedule.decay_steps: remove one of the two"
            )
        if self.decay_from is not None and not self.warmup_steps <= self.decay_from < self.curve_steps:
            raise ValueError(
                f"megagpt.schedule.decay_from={self.decay_from} is not between the warm-up, which ends at step "
                f"{self.warmup_steps}, and the last step, {self.curve_steps}; change it"
            )
        if (self.decay_steps is not None) != (decays and self.decay_from is None):
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
