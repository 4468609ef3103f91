"""Exponential moving averages of the weights (EMA), in the optimizer's state.

There an average is laid out as Adam's moments are: in fp32, sharded, saved in checkpoints, resharded with them. Polyak
and Juditsky (1992) averaged all iterates with equal weights; an EMA forgets the first ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from torch.optim import Optimizer

from megagpt.engine.flat_tensors import own_slices, param_sizes, refresh_weights

EMA = "ema"  # the name of an average in the optimizer's state


def average_weights(engine: Engine, decay: float) -> None:
    """Let each update of the optimizer move the averages: average = d * average + (1 - d) * weights.

    d is min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights, which are random, are soon forgotten
    (as TensorFlow's ExponentialMovingAverage does with num_updates). An update that a guard leaves out does not count.
    An average that is not there yet begins with the weights.
    """

    @torch.no_grad()
    def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state[p]
            if EMA not in state:
                state[EMA] = p.detach().clone()
            n_updates = torch.as_tensor(state["step"], dtype=torch.float32)
            share = torch.clamp(9.0 / (10.0 + n_updates), min=1.0 - decay)
            state[EMA].lerp_(p, (share if skipped is None else share * (1.0 - skipped)).to(p.device))

    engine.basic_optimizer.register_step_post_hook(average)


def has_averages(engine: Engine) -> bool:
    """Tell whether the averages have begun: after the first update with them."""
    return any(EMA in state for state in engine.basic_optimizer.state.values())


def drop_averages(engine: Engine) -> None:
    """Forget averages that a checkpoint has and this run does not continue."""
    for state in engine.basic_optimizer.state.values():
        state.pop(EMA, None)


@contextmanager
def averaged(engine: Engine, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Let the engine compute with the averages inside the context; afterwards the weights are as they were. Collective.

    `groups`: the optimizer's groups of the model's own parameters.
    """
    _exchange(engine, groups)
    try:
        yield
    finally:
        _exchange(engine, groups)


@torch.no_grad()
def _exchange(engine: Engine, groups: list[dict[str, Any]]) -> None:
    own = own_slices(engine, param_sizes(engine, groups))
    for flat, _ in own:
        state = engine.basic_optimizer.state[flat]
        if EMA in state:  # a rank's tensor may be empty
            kept = flat.data.clone()
            flat.data.copy_(state[EMA])
            state[EMA].copy_(kept)
    refresh_weights(engine, own)
