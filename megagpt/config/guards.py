"""The part of the schema that says what stops or repairs a run while it trains."""

from typing import Literal

from pydantic import Field

from megagpt.config.parsing import Strict
from megagpt.options import MANY


class SpikesConfig(Strict):
    """Loss spikes: what is one, and what to do about it.

    A loss or gradient norm is a spike if its logarithm exceeds the median of the last `window` steps by more than
    `sigma` standard deviations, which are estimated from the median absolute deviation.
    """

    action: Literal["none", "log", "skip", "roll back", "stop"] = Field(
        default="log", description="skip: without the update; roll back: to the last checkpoint, then past the spike"
    )
    window: int = Field(default=128, ge=8, le=1_000_000, description="steps")
    sigma: float = Field(default=6.0, gt=0.0, le=1e6, description="standard deviations above the median")


class GuardsConfig(Strict):
    """The guards that watch a run while it trains."""

    max_bad_steps: int = Field(
        default=3, gt=0, le=MANY, description="stop after this number of non-finite steps in a row"
    )
    spikes: SpikesConfig = SpikesConfig()
    compare_every: int = Field(
        default=1000, ge=0, le=MANY, description="steps between comparing weights over ranks; 0: never"
    )
    memory_growth_mib: float = Field(
        default=256.0, ge=0.0, le=1e12, description="per 1000 steps, reported if it repeats; 0: never"
    )
    hang_timeout: float = Field(
        default=600.0, ge=0.0, le=1e9, description="seconds without a step, then end the run; 0: never"
    )
