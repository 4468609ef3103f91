"""The schema of a run file's "megagpt.recompute" section."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megagpt.config.mistakes import as_written
from megagpt.config.model import DEEPEST
from megagpt.config.parsing import Strict


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
