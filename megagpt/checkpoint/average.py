"""Average the weights of committed steps (Polyak averaging, checkpoint averaging, model soups), in fp32."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.commit import read_commit
from megagpt.checkpoint.load import packing_of
from megagpt.checkpoint.named_step import step_of
from megagpt.config.model import ModelConfig
from megagpt.data.packing import PACKING
from megagpt.errors import UserError
from megagpt.model.gpt import GPT

LEAST = 2  # steps


class RunningAverage:
    """The weighted sum of models that are added one after the other: memory holds it and one of them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: GPT, share: float) -> None:
        """Add a model in fp32, times its share of the average."""
        for name, weight in model.named_parameters():  # a tied one once
            if name in self.weights:
                self.weights[name].add_(weight.cpu(), alpha=share)
            else:
                self.weights[name] = weight.cpu() * share

    def copy_to(self, model: GPT) -> None:
        """Give a model these weights."""
        for name, weight in model.named_parameters():
            weight.data.copy_(self.weights[name])


def alike_steps(paths: Sequence[Path]) -> list[Path]:
    """Return the committed steps that these name. Raises UserError unless they can be averaged."""
    if len(paths) < LEAST:
        raise UserError("nothing to average: give two steps or more, and after them a new folder")
    steps = [step_of(path) for path in paths]
    first = read_commit(steps[0]).identity
    for number, step_dir in enumerate(steps):
        same = [other for other in steps[:number] if other.resolve() == step_dir.resolve()]
        if same:
            raise UserError(f"{step_dir} is named twice; name each step once, and give it more weight by --weights")
        identity = read_commit(step_dir).identity
        its, wanted = ModelConfig.whole(identity.model), ModelConfig.whole(first.model)
        for name, value in its.items():
            if name != "attention" and wanted[name] != value:
                raise UserError(
                    f"{step_dir} has {name}={value}, and {steps[0]} {wanted[name]}; give steps of models of one shape"
                )
        if identity.tokenizer != first.tokenizer:
            raise UserError(
                f"{step_dir} has another tokenizer than {steps[0]}; give steps of models with one tokenizer"
            )
        if _masked(step_dir) != _masked(steps[0]):
            raise UserError(
                f"{step_dir} and {steps[0]} differ in whether attention stays within documents (megagpt.packing.kind); "
                "give steps that were trained alike"
            )
    return steps


def _masked(step_dir: Path) -> bool:
    return PACKING[packing_of(step_dir).kind].masked


def shares_of(steps: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return each step's share of the average: weights relative to their sum, by default equal ones."""
    if weights is None:
        return [1.0 / len(steps)] * len(steps)
    if len(weights) != len(steps):
        raise UserError(f"--weights has {len(weights)} numbers for {len(steps)} steps; give one for each step")
    return [weight / sum(weights) for weight in weights]
