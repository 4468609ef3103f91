"""Straight and cut in two, on two ranks, for every combination of what could break a resume; all in one launch.

The state is rebuilt from disk each time: `trainer.train` builds a new engine, and DeepSpeed keeps none of the old one.
As a program it runs all 128 cases; tests/programs/two_ranks.py runs 8 of them, in which every two settings meet.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support import debug_run

from megagpt.checkpoint import load
from megagpt.cli.verify_resume import what_differs
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import init_process_group, is_main, leave
from megagpt.train import trainer

CUT_AT = {"warmup": 2, "patience": 5}  # steps: in the middle of warm-up and of patience, and of an epoch both
LAST = 7
OPTIONS = [
    # Rows of 16 tokens in steps 1 and 2, of 32 in 3 and 4, of 64 then: a cut lies between two lengths.
    # Batches of 4 samples in steps 1 to 5, then of 8.
    f'megagpt.schedule={{"max_steps": {LAST}, "warmup_steps": 4, "seq_len_warmup_steps": 4, "first_seq_len": 16, '
    '"batch_ramp_steps": 5, "first_batch": 4}',
    'megagpt.every={"log": 1, "eval": 2, "save": 0}',
    'megagpt.early_stopping={"patience": 3, "min_delta": 100, "restore_best": false}',  # no evaluation but the first
    "megagpt.data.val_tokens=128",
]
_numbers = count()
DROPOUT = ["megagpt.regularization.dropout=0.1", "megagpt.recompute.policy=full"]


@dataclass(frozen=True)
class Case:
    stage: int
    bf16: bool
    dropout: bool  # with every block recomputed
    accumulation: int  # of the smaller batches
    cut: str
    muon: bool

    def __str__(self) -> str:
        parts = ["bf16" if self.bf16 else "fp32", "dropout" if self.dropout else "plain"]
        parts += ["Muon"] if self.muon else []
        return f"stage {self.stage}, {', '.join(parts)}, accumulation {self.accumulation}, cut in {self.cut}"

    def options(self) -> list[str]:
        return [
            *OPTIONS,
            f"zero_optimization.stage={self.stage}",
            f"bf16.enabled={str(self.bf16).lower()}",
            f"train_micro_batch_size_per_gpu={2 // self.accumulation}",
            *(DROPOUT if self.dropout else []),
            *(["optimizer.type=Muon", "optimizer.params.muon_lr=0.01"] if self.muon else []),
        ]


CASES = [Case(*levels) for levels in product(range(4), (False, True), (False, True), (1, 2), CUT_AT, (False, True))]
# The orthogonal array L8: of three bits two are the stage, and the other columns sums that hold the third. It has no
# column more; the last setting, too, meets both values of each other one, but not as often.
COVERING = [
    Case(2 * a + b, bool(c), bool(a ^ c), 1 + (b ^ c), list(CUT_AT)[a ^ b ^ c], bool(c ^ (a & b)))
    for a, b, c in product((0, 1), repeat=3)
]


def what_a_cut_changes(case: Case, dataset: Path, folder: Path, device: Any) -> dict[str, Any]:
    """Collective. `differs` is about the files; the losses are this rank's own, to the last bit."""
    run, options = folder / "run", tuple(case.options())
    straight, losses = _straight(options, dataset, folder, device)
    cut = [loss for stop_at in (CUT_AT[case.cut], LAST) for loss in _losses_to(stop_at, dataset, run, options, device)]
    dist.barrier()
    found = {"differs": list(what_differs(straight, run)), "straight": losses, "cut": cut}
    _rename(run, folder / f"run{next(_numbers)}")
    return found


@cache
def _straight(options: tuple[str, ...], dataset: Path, folder: Path, device: Any) -> tuple[Path, list[str]]:
    """Run under the same name as the one that is cut, so that even paths in files agree."""
    straight, losses = folder / f"run{next(_numbers)}", _losses_to(LAST, dataset, folder / "run", options, device)
    _rename(folder / "run", straight)
    return straight, losses


def _losses_to(stop_at: int, dataset: Path, out_dir: Path, options: tuple[str, ...], device: Any) -> list[str]:
    with noting_losses() as losses:
        trainer.train(debug_run(dataset, out_dir, *options), device, stop_at=stop_at)
    return losses


def _rename(before: Path, after: Path) -> None:
    dist.barrier()
    if is_main():
        before.rename(after)
    dist.barrier()


@contextmanager
def noting_losses() -> Iterator[list[str]]:
    """This rank's loss of every step, in hexadecimal."""
    losses: list[str] = []
    original = trainer.train_step

    def noting(*args: Any) -> Any:
        result = original(*args)
        losses.append(result[0].item().hex())
        return result

    trainer.train_step = noting
    try:
        yield losses
    finally:
        trainer.train_step = original


@contextmanager
def without_generators() -> Iterator[None]:
    """The control: a resume that forgets the random generators."""
    original = load.set_rng_state
    load.set_rng_state = lambda saved: None
    try:
        yield
    finally:
        load.set_rng_state = original


def exact(ranks: list[dict[str, Any]]) -> bool:
    return all(not found["differs"] and found["straight"] == found["cut"] for found in ranks)


def main(dataset: Path, folder: Path) -> int:
    device = init_process_group()
    wrong = 0
    for case in CASES:
        ranks = gather_objects(what_a_cut_changes(case, dataset, folder, device))
        verdicts = [exact(ranks)]
        if case.dropout:
            with without_generators():
                ranks = gather_objects(what_a_cut_changes(case, dataset, folder, device))
            verdicts.append(any(found["straight"] != found["cut"] for found in ranks))
        wrong += not all(verdicts)
        if is_main():
            control = f"; without its generators {'different' if verdicts[-1] else 'THE SAME'}" if case.dropout else ""
            print(f"{case}: {'the same' if verdicts[0] else 'NOT the same'}{control}", flush=True)
    if is_main():
        print(f"{len(CASES) - wrong} of {len(CASES)} as they should be", flush=True)
    leave()
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(*map(Path, sys.argv[1:]))))
