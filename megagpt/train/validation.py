"""Measure a run's validation sets while it trains: the loss that decides, and the metrics of each set."""

import math
from collections.abc import Mapping

import torch

from megagpt.config.schema import EMA_LOSS
from megagpt.distributed.process_group import print_rank0
from megagpt.engine.build import Engine, optimizer_groups
from megagpt.engine.ema import averaged, has_averages
from megagpt.terminal import YELLOW
from megagpt.train.evaluate import Evaluation, evaluate, mean_of, metrics_of_sets
from megagpt.train.preflight import RunSetup


class Validation:
    """The validation sets of a run, and what their last measurement showed. All methods are collective."""

    def __init__(self, engine: Engine, setup: RunSetup, device: torch.device) -> None:
        self._engine, self._setup = engine, setup
        self._token_bytes = torch.from_numpy(setup.data.tokenizer.token_bytes()).to(device)
        self.forget()

    def forget(self) -> None:
        """Forget the last measurement, as after a roll-back: its step comes again, with other weights."""
        self.step, self._finite = 0, True

    def not_finite(self, step: int) -> bool:
        """Tell whether the weights of this step were measured last, and no set had a finite loss."""
        return self.step == step and not self._finite

    def metrics(self, step: int) -> dict[str, float]:
        """Measure each validation set; returns the metrics of all, and of those that decide together.

        With averaged weights, once they have begun, also their losses.
        """
        found = self._measured()
        self._judge(step, found)
        together = self._together(found)
        metrics = {
            "val/loss": together.loss,
            "val/perplexity": together.perplexity,
            "val/bits_per_byte": together.bits_per_byte,
            **metrics_of_sets(found),
        }
        if has_averages(self._engine):
            with averaged(self._engine, optimizer_groups(self._engine.module, self._setup.run)):
                found = self._measured()
            metrics[EMA_LOSS] = self._together(found).loss
            metrics |= {f"{EMA_LOSS}/{name}": one.loss for name, one in found.items() if name}
        return metrics

    def _together(self, found: Mapping[str, Evaluation]) -> Evaluation:
        """Return the result of the sets that decide."""
        deciding = self._setup.run.megagpt.deciding_sets
        weights = [one.weight for one in deciding.values() if one.weight is not None]
        return mean_of([found[name] for name in deciding], weights)

    def _measured(self) -> dict[str, Evaluation]:
        return {
            name: evaluate(
                self._engine,
                one.windows,
                self._token_bytes,
                micro_batch=self._setup.batch.micro_batch,
                sequence_parallel_size=self._setup.batch.sequence_parallel_size,
            )
            for name, one in self._setup.data.val.items()
        }

    def _judge(self, step: int, found: Mapping[str, Evaluation]) -> None:
        """Note, and say, which losses are not finite."""
        broken = [name for name, one in found.items() if not math.isfinite(one.loss)]
        # One set whose loss is finite shows that the weights are.
        self.step, self._finite = step, len(broken) < len(found)
        if broken and self._finite:
            losses = ", ".join(f"val/loss/{name}" for name in broken)
            print_rank0(f"not finite at step {step}, though the weights are: {losses}", color=YELLOW)
