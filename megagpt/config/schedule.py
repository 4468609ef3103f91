"""The schema of a run file's "megagpt.schedule" section."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megagpt.config.mistakes import as_written
from megagpt.config.parsing import Strict
from megagpt.options import MANY


class ScheduleConfig(Strict):
    """The learning rate over steps, as a factor on the peak rate (`optimizer.params.lr`)."""

    max_steps: int = Field(gt=0, le=MANY, description="optimizer updates of the whole run")
    warmup_steps: int = Field(default=0, ge=0, le=MANY, description="first steps, over which the rate rises linearly")
    shape: Literal["cosine", "linear", "constant", "warmup-stable-decay", "range-test"] = Field(
        default="cosine",
        description="of the curve after the warm-up; range-test: rises from megagpt.schedule.min_lr_ratio to the peak",
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
