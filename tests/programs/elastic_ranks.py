"""What engine/test_reshard.py runs on one, two and four ranks: parts of a chained run, and every pair of stages."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from support import debug_run
from torch import Tensor

from megagpt.data.loader import Batch
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import init_process_group, leave, rank
from megagpt.engine.build import Engine
from megagpt.engine.muon import Muon
from megagpt.train.preflight import prepare
from megagpt.train.session import Session
from megagpt.train.trainer import train

DEVICE = init_process_group()
CHAIN = [(1, 1, 4), (2, 3, 2), (4, 0, 1), (1, 2, 8)]  # ranks, ZeRO stage, micro-batch of each part
STEPS_EACH = 4
RAMP = ["megagpt.schedule.first_batch=4", "megagpt.schedule.batch_ramp_steps=7"]  # of 8: its end is in the second part
RUN = ["megagpt.schedule.max_steps=16", "megagpt.data.val_tokens=256", 'megagpt.every={"log": 1, "eval": 0, "save": 0}']


def options(stage: int, *more: str) -> list[str]:
    return [*RUN, f"zero_optimization.stage={stage}", *more]


def part_of_the_chain(dataset: Path, folder: Path, part: int) -> None:
    """Train four steps more of folder/run, and put down every row of tokens that this rank took."""
    _, stage, micro_batch = CHAIN[part]
    run = debug_run(dataset, folder / "run", *options(stage, f"train_micro_batch_size_per_gpu={micro_batch}", *RAMP))
    with rows_taken() as rows:
        train(run, DEVICE, stop_at=STEPS_EACH * (part + 1))
    np.save(folder / f"rows.{part}.{rank()}.npy", torch.cat(rows).numpy())


@contextmanager
def rows_taken() -> Iterator[list[Tensor]]:
    """The inputs of every micro-batch that a step took: (micro_batch, seq_len) each."""
    rows: list[Tensor] = []
    original = Session.batches

    def noting(self: Session) -> Iterator[Batch]:
        for batch in original(self):
            rows.append(batch.inputs.clone())
            yield batch

    Session.batches = noting
    try:
        yield rows
    finally:
        Session.batches = original


def opened(dataset: Path, out_dir: Path, *overrides: str) -> Engine:
    """An engine as a resumed run has it before its first step."""
    plan = prepare(debug_run(dataset, out_dir, *overrides), DEVICE, fresh=False)
    assert plan.saved is not None
    return Session(plan, DEVICE).engine


def whole_state(engine: Engine) -> dict[str, list[Tensor]]:
    """Of every parameter fp32 weights and its moments, gathered by DeepSpeed's own means. Collective."""
    found = {}
    of_muon = [name for name, p in engine.module.named_parameters() if name.startswith("h.") and len(shape_of(p)) == 2]
    muon = of_muon if isinstance(engine.basic_optimizer, Muon) else []
    if engine.zero_optimization_stage() in (1, 2):
        # Else only the first step does it, when no group but the first has a state.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters():
        keys = ["exp_avg"] if name in muon else ["exp_avg", "exp_avg_sq"]
        if engine.zero_optimization_stage() > 0:
            moments = [safe_get_full_optimizer_state(p, key) for key in keys]
            found[name] = [safe_get_full_fp32_param(p), *moments]
        else:
            fp32 = fp32_of(engine, p)
            found[name] = [fp32, *(engine.basic_optimizer.state[fp32][key] for key in keys)]
    return {name: [x.detach().reshape(-1).clone() for x in state] for name, state in found.items()}


def shape_of(p: Tensor) -> torch.Size:
    return torch.Size(getattr(p, "ds_shape", p.shape))


def fp32_of(engine: Engine, p: Tensor) -> Tensor:
    """At stage 0: the parameter itself, or in 16 bit the copy that Adam updates."""
    if engine.optimizer is engine.basic_optimizer:
        return p
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return next(fp32 for low, high in pairs for q, fp32 in zip(low, high, strict=True) if q is p)


def pairs_that_differ(dataset: Path, folder: Path, dtype: str) -> list[str]:
    """Every ordered pair of stages: what DeepSpeed loads of its own files, against what the other stage took over."""
    differ = []
    for before in range(4):
        out_dir, bf16 = folder / f"stage{before} {dtype}", f"bf16.enabled={json.dumps(dtype == 'bf16')}"
        train(debug_run(dataset, out_dir, *options(before, bf16)), DEVICE, stop_at=2)
        expected = whole_state(opened(dataset, out_dir, *options(before, bf16)))
        for after in {0, 1, 2, 3} - {before}:
            engine = opened(dataset, out_dir, *options(after, bf16))
            found = whole_state(engine)
            assert found.keys() == expected.keys()
            differ += [
                f"{before} to {after}: {name} {kind}"
                for name in expected
                for kind, a, b in zip(("weight", "exp_avg", "exp_avg_sq"), expected[name], found[name], strict=True)
                if not torch.equal(a, b)
            ]
            differ += [f"{before} to {after}: computes with another {name}" for name in computed_wrong(engine, found)]
    return differ


def computed_wrong(engine: Engine, state: dict[str, list[Tensor]]) -> list[str]:
    """The parameters that the model computes with, where they are not the fp32 weights, rounded to its dtype."""
    wrong = []
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3):
            if not torch.equal(p.detach().flatten(), state[name][0].to(p.dtype)):
                wrong.append(name)
    return wrong


def main(dataset: Path, folder: Path, part: str, dtype: str) -> None:
    """A part of the chain, the pairs of stages in one dtype, or both."""
    if part:
        part_of_the_chain(dataset, folder, int(part))
    if dtype:
        found = gather_objects(pairs_that_differ(dataset, folder, dtype))
        if rank() == 0:
            (folder / f"pairs.{dtype}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    leave()
