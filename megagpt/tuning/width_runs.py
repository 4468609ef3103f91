"""The short runs of one width, in a process of their own: `python -m megagpt.tuning.width_runs` for `tune --transfer`.

It reads a request (JSON) from standard input, and writes a line of JSON for each optimizer: how the sizes of its
activations moved, and the losses of the rates that were tried.
"""

import gc
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.data.loader import Batch
from megagpt.distributed.process_group import leave
from megagpt.distributed.rendezvous import meet
from megagpt.engine.precision import with_supported_dtype
from megagpt.errors import UserError
from megagpt.guards.deepspeed_errors import deepspeed_explained
from megagpt.guards.out_of_memory import explained
from megagpt.lint.linter import lint_or_raise
from megagpt.model.gpt import Output, with_values
from megagpt.train.preflight import prepare
from megagpt.train.session import Session
from megagpt.train.trainer import train_step
from megagpt.tuning.rate_test import as_typed
from megagpt.tuning.widths import search

CHECKED = 10  # steps at one rate after which sizes are compared
SEQUENCES = 2  # that they are measured on


@dataclass
class Request:
    """The runs of one width."""

    run_file: str
    options: list[str]  # the user's, and those of the width
    optimizers: dict[str, list[str]]  # name -> keys that choose it
    rates: dict[str, dict[str, float]]  # name -> keys and values of its rates, which are doubled and halved together
    starts: dict[str, int]  # name -> doublings at which the search begins
    also: dict[str, int]  # name -> doublings that are tried in any case
    steps: int
    folder: str


@dataclass
class Found:
    """The results of the runs of one optimizer at one width."""

    optimizer: str
    refused: str  # why it was not run; empty if it was
    sizes: dict[str, tuple[float, float]]  # activation -> mean |x| after CHECKED steps, and mean |change|
    losses: dict[int, float]  # doublings of the rate -> validation loss; infinite if a step was not finite


def main() -> int:
    """Answer the request. Training prints to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = Request(**json.loads(sys.stdin.readline()))
    device = meet()
    for name in request.optimizers:
        try:
            found = _found(request, name, device)
        except UserError as error:
            found = Found(name, str(error), {}, {})
        print(json.dumps(asdict(found)), file=answers, flush=True)
    leave()
    return 0


def _found(request: Request, name: str, device: torch.device) -> Found:
    def run_of(doublings: int, schedule: dict[str, Any], folder: str) -> RunConfig:
        keys = [*request.optimizers[name], *as_typed({k: r * 2.0**doublings for k, r in request.rates[name].items()})]
        out_dir = Path(request.folder) / f"{name}_{folder}"
        keys += as_typed({"megagpt.schedule": schedule, "megagpt.out_dir": str(out_dir)})
        return with_supported_dtype(load_run_config(Path(request.run_file), [*request.options, *keys]), device)

    check = run_of(0, {"max_steps": CHECKED, "shape": "constant"}, "sizes")
    lint_or_raise(check)
    sizes = coordinates(check, device)
    schedule = {
        "max_steps": request.steps,
        "warmup_steps": request.steps // 10,
        "shape": "linear",
        "min_lr_ratio": 0.0,
    }
    also = [request.also[name]] if name in request.also else []
    losses = search(lambda i: loss_of(run_of(i, schedule, str(i)), device), request.starts[name], also)
    return Found(name, "", sizes, losses)


def loss_of(run: RunConfig, device: torch.device) -> float:
    """Train a run to its end, without saving; return its validation loss, infinite if a step was not finite."""
    with explained(run, device), deepspeed_explained(run):
        session, _ = _begun(run, device)
        loss = math.inf
        if _trained(session):
            loss = session.validation.metrics(run.megagpt.schedule.max_steps)["val/loss"]
        _end(session)
    return loss if math.isfinite(loss) else math.inf


def coordinates(run: RunConfig, device: torch.device) -> dict[str, tuple[float, float]]:
    """Train a run; return mean |x| of its activations at the end, and the mean |change|, on its first sequences.

    The coordinate check of Yang et al. 2022, Tensor Programs V, appendix D.1.
    """
    with explained(run, device), deepspeed_explained(run):
        session, first = _begun(run, device)
        before = activations(session, first)
        _trained(session)
        after = activations(session, first)
        _end(session)
    return {name: (_mean(x), _mean(x - before[name])) for name, x in after.items()}


@torch.no_grad()
def activations(session: Session, batch: Batch) -> dict[str, Tensor]:
    """Return the outputs of each block, and the logits of the tokenizer's own ids, on a few sequences."""
    model, found = session.engine.module, dict[str, Tensor]()

    def keep(name: str, output: Output) -> None:
        found[name] = with_values(output)[0].detach().float().clone()

    hooks = [
        block.register_forward_hook(lambda _, args, output, name=f"block {i}": keep(name, output))
        for i, block in enumerate(model.blocks(), start=1)
    ]
    model.eval()
    documents = None if batch.documents is None else batch.documents[:SEQUENCES]
    logits = model(batch.inputs[:SEQUENCES], documents=documents)
    model.train()
    for hook in hooks:
        hook.remove()
    keep("logits", logits[..., : session.setup.data.tokenizer.vocab_size])
    return found


def _begun(run: RunConfig, device: torch.device) -> tuple[Session, Batch]:
    session = Session(prepare(run, device, fresh=True), device)
    return session, next(session.batches())


def _trained(session: Session) -> bool:
    """Make all steps of a run; stop, and return False, at one that is not finite."""
    batches = session.batches()
    for step in range(session.cfg.schedule.max_steps):
        session.set_step(step)
        if not train_step(session, batches).loss.isfinite():
            return False
    return True


def _end(session: Session) -> None:
    session.monitor.close("stopped")
    session.engine.destroy()
    gc.collect()


def _mean(x: Tensor) -> float:
    return x.abs().mean().item()


if __name__ == "__main__":
    sys.exit(main())
