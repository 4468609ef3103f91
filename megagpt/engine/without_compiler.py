"""Keep torch's compiler out of runs that compile nothing: importing it is half of the processor time of their start.

torch and DeepSpeed import it in any case: to exclude functions from the graphs around them, and DeepSpeed to compile a
part of its Muon. Here only a block's forward pass and the loss are ever compiled, each as one graph from which nothing
is excluded, so that none of it has an effect.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch.optim import Optimizer

# What has functions that `torch._disable_dynamo` wraps: it imports the compiler when one is called first.
EXCLUDING: tuple[ModuleType | type, ...] = (
    Optimizer,
    coordinator,
    coordinator.PartitionedParameterCoordinator,
)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Build an engine inside this, and neither building nor running it imports torch's compiler.

    What is set on the classes of EXCLUDING stays in this process, where a later engine may compile: none of its graphs
    calls them.
    """
    wraps_in = torch._disable_dynamo.__code__.co_filename
    for place in EXCLUDING:
        for wrapper in vars(place).values():
            if inspect.isfunction(wrapper) and wrapper.__code__.co_filename == wraps_in:
                plain = vars(wrapper)["__wrapped__"]
                vars(plain)["__dynamo_disable"] = plain
    disable, compile_function = torch.compiler.disable, compiler.compile
    torch.compiler.disable = lambda fn=None, **_: fn or (lambda fn: fn)
    compiler.compile = lambda: lambda fn: fn
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")  # as DeepSpeed does now, at ZeRO stages 1 to 3
        yield
    finally:
        torch.compiler.disable, compiler.compile = disable, compile_function


def step_without_compiler(optimizer: Optimizer) -> None:
    """Give an optimizer of torch's a `step` without the decorator that breaks graphs around it."""
    plain = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = partial(Optimizer.profile_hook_step(plain), optimizer)  # type: ignore[method-assign]
