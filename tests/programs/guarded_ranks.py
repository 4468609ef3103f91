"""Faults injected on rank 1 of two real gloo ranks, in one launch; test_guards.py judges what both ranks saw."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import torch
from support import debug_run, metric, run_scenarios

from megagpt.checkpoint import save
from megagpt.checkpoint.async_writer import Writer
from megagpt.checkpoint.commit import committed, write_commit
from megagpt.distributed.process_group import init_process_group, rank
from megagpt.errors import UserError
from megagpt.guards import memory_growth
from megagpt.model.loss import Score
from megagpt.train import session, trainer

DEVICE = init_process_group()
EACH = ["megagpt.every.log=4", "megagpt.every.eval=0", "megagpt.data.val_tokens=128", "tensorboard.enabled=false"]
SPIKES = 'megagpt.guards.spikes={{"action": "{}", "window": 16}}'
SHORT = ["megagpt.schedule.max_steps=11"]
ACCUMULATION = ["train_micro_batch_size_per_gpu=2"]  # of 2


def at_stage(stage: int, *more: str) -> list[str]:
    return [f"zero_optimization.stage={stage}", *more]


OFFLOAD = 'zero_optimization.offload_optimizer={"device": "cpu"}'
KINDS = {
    **{f"stage {stage} fp32": at_stage(stage) for stage in range(4)},
    **{f"stage {stage} bf16": at_stage(stage, "bf16.enabled=true") for stage in range(4)},
    **{f"stage {stage} accumulation": at_stage(stage, *ACCUMULATION) for stage in (0, 2)},
    **{f"stage {stage} offload": at_stage(stage, OFFLOAD, *ACCUMULATION) for stage in (2, 3)},
    **{f"stage {stage} no clipping": at_stage(stage, "gradient_clipping=0") for stage in (0, 1)},
    "stage 0 bf16 no clipping": at_stage(0, "gradient_clipping=0", "bf16.enabled=true"),
}


class Faulty:
    """A run in which rank 1's loss has a factor in the first micro-batch of some steps.

    What was said is kept, and what weights and moments were after each step and each time they were loaded.
    """

    def __init__(self, factors: dict[int, float] | None = None, act: Callable[[int, Any], None] | None = None) -> None:
        self.factors, self.act = factors or {}, act or (lambda step, engine: None)
        self.steps, self.micro_batches, self.said, self.weights, self.loaded = 0, 0, [], [], []
        self.originals = trainer.train_step, trainer.next_token_score, session.print_rank0, session.resume

    def __enter__(self) -> "Faulty":
        train_step, next_token_score, _, resume = self.originals

        def step(run: Any, batches: Any) -> Any:
            self.steps += 1
            self.micro_batches = 0
            result = train_step(run, batches)
            self.weights.append(digest(run.engine))
            if rank() == 1:
                self.act(self.steps, run.engine)
            return result

        def score(*args: Any, **kw: Any) -> Score:
            self.micro_batches += 1
            here = rank() == 1 and self.micro_batches == 1
            inner, factor = next_token_score(*args, **kw), self.factors.get(self.steps, 1.0) if here else 1.0
            return lambda *given: inner(*given) * factor

        def load(engine: Any, *args: Any) -> None:
            resume(engine, *args)
            self.loaded.append(digest(engine))

        trainer.train_step, trainer.next_token_score, session.resume = step, score, load
        session.print_rank0 = lambda text, **_: self.said.append(text)
        return self

    def __exit__(self, *_: object) -> None:
        trainer.train_step, trainer.next_token_score, session.print_rank0, session.resume = self.originals

    def train(self, dataset: Path, out_dir: Path, *more: str, stop_at: int | None = None) -> dict[str, Any]:
        state, message = None, ""
        try:
            state = trainer.train(debug_run(dataset, out_dir, *EACH, *more), DEVICE, stop_at=stop_at)
        except UserError as error:
            message = str(error)
        return {
            "message": message,
            "said": [line for line in self.said if " changed: " not in line and "layers" not in line],
            "weights": self.weights,
            "loaded": self.loaded,
            "state": None if state is None else asdict(state),
            "committed": [path.name for path in committed(out_dir)],
            "loss": metric(out_dir, "train/loss"),
        }


def digest(engine: Any) -> str:
    """sha256 of what this rank holds of each parameter, and of Adam's moments and counts."""
    whole = hashlib.sha256()
    for p in engine.module.parameters():
        whole.update(getattr(p, "ds_tensor", p).detach().float().numpy().tobytes())
    for state in engine.basic_optimizer.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            whole.update(state[name].float().numpy().tobytes())
    return whole.hexdigest()


def one_step_that_is_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for name, kind in KINDS.items():
        with Faulty({5: float("nan")}) as run:
            found[name] = run.train(dataset, folder / name, *kind, "megagpt.schedule.max_steps=7")
    return found


def three_steps_in_a_row_that_are_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    with Faulty(dict.fromkeys((2, 6, 7, 8), float("inf"))) as run:
        return run.train(dataset, folder / "run", "megagpt.every.save=4", *ACCUMULATION)


def a_shard_that_is_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    """On rank 1 alone, just before step 4 is saved: a start by the same command then goes on without the fault."""
    found = {}
    options = ["megagpt.every.save=2", "megagpt.every.log=1", *SHORT]
    for name in ("stage 0 fp32", "stage 1 fp32", "stage 2 bf16", "stage 3 fp32", "beside"):
        kind = [*KINDS["stage 3 bf16"], "megagpt.save_async=true"] if name == "beside" else KINDS[name]
        with Faulty(act=break_shard) as run:
            found[name] = run.train(dataset, folder / name, *kind, *options)
        with Faulty() as run:
            found[name]["again"] = run.train(dataset, folder / name, *kind, *options)
    return found


def an_older_step_that_is_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    """An older megagpt committed step 4; a start with another stage passes over it on both ranks."""
    refuse, save.refuse_not_finite = save.refuse_not_finite, lambda step_dir, files: None
    save.write_commit = lambda *args, **_: write_commit(*args)  # which does not tell that nothing was checked
    with Faulty(act=break_shard) as run:
        run.train(dataset, folder / "run", *KINDS["stage 1 fp32"], "megagpt.every.save=2", stop_at=4)
    save.refuse_not_finite, save.write_commit = refuse, write_commit
    with Faulty() as run:
        return run.train(dataset, folder / "run", *KINDS["stage 3 fp32"], "megagpt.every.save=2", stop_at=6)


def break_shard(step: int, engine: Any) -> None:
    """One value of what this rank alone holds of the weights; at stage 0 of its own copy of them all."""
    if step == 4:
        stage = engine.zero_optimization_stage()
        names = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
        held = getattr(engine.optimizer, names.get(stage, "fp32_partitioned_groups_flat"), None)
        (held[0] if held else next(engine.module.parameters())).data.view(-1)[3] = float("nan")


def a_spike(dataset: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for action in ("none", "log", "stop"):
        with Faulty({14: 30.0}) as run:
            found[action] = run.train(dataset, folder / action, SPIKES.format(action), "megagpt.every.save=6")
    return found


def spikes_left_out(dataset: Path, folder: Path) -> dict[str, Any]:
    """The first at the first step that is judged, after one that DeepSpeed may leave out itself."""
    found, factors = {}, {5: float("nan"), 9: 30.0}
    for name in (
        "stage 0 fp32",
        "stage 1 fp32",
        "stage 2 bf16",
        "stage 3 fp32",
        "stage 2 accumulation",
        "stage 3 offload",
    ):
        with Faulty(factors) as run:
            found[name] = run.train(dataset, folder / name, *KINDS[name], SPIKES.format("skip"), *SHORT)
    with Faulty(factors) as run:
        run.train(dataset, folder / "cut", SPIKES.format("skip"), *SHORT, stop_at=7)
        found["cut"] = run.train(dataset, folder / "cut", SPIKES.format("skip"), *SHORT)
    return found


def rolled_back(dataset: Path, folder: Path) -> dict[str, Any]:
    found, options = {}, [SPIKES.format("roll back"), "megagpt.every.save=6"]
    with Faulty({14: 30.0}) as run:
        found["straight"] = run.train(dataset, folder / "straight", *options)
    with Faulty({14: 30.0}) as run:
        run.train(dataset, folder / "cut", *options, stop_at=18)
        found["cut"] = run.train(dataset, folder / "cut", *options)
    with Faulty(dict.fromkeys((14, 18, 22, 26), 30.0)) as run:
        found["again and again"] = run.train(dataset, folder / "again", *options)
    with Faulty({14: 30.0}) as run:
        run.train(dataset, folder / "reshaped", *options, stop_at=12)
        found["reshaped"] = run.train(dataset, folder / "reshaped", *options, "zero_optimization.stage=3")
    with Faulty({13: 30.0}) as run, slow_writer(run, until=13):
        found["beside a save"] = run.train(
            dataset, folder / "beside", *options, "megagpt.save_async=true", "megagpt.every.log=1"
        )
    return found


def stopped_beside_a_save(dataset: Path, folder: Path) -> dict[str, Any]:
    options = [SPIKES.format("stop"), "megagpt.every.save=6", "megagpt.save_async=true", "megagpt.every.log=1"]
    with Faulty({13: 30.0}) as run, slow_writer(run, until=13):
        return run.train(dataset, folder / "run", *options)


@contextmanager
def slow_writer(run: Faulty, until: int) -> Iterator[None]:
    """Step 12 is not written before somebody waits for it after so many steps."""
    waited, wait, write_files = Event(), Writer.wait, save.write_files

    def waiting(writer: Writer) -> None:
        if run.steps >= until:
            waited.set()
        wait(writer)

    def writing(step_dir: Path, files: dict[Path, Any]) -> None:
        if step_dir.name == "step_00000012":
            waited.wait(60)
        write_files(step_dir, files)

    Writer.wait, save.write_files = waiting, writing
    yield
    Writer.wait, save.write_files = wait, write_files


def a_bit_that_flipped(dataset: Path, folder: Path) -> dict[str, str]:
    def flip(step: int, engine: Any) -> None:
        if step == 3:
            bits = dict(engine.module.named_parameters())["h.1.ln_1.bias"].detach().view(torch.int32)
            bits[7] ^= 1 << 20  # of the mantissa: the lowest ones may be rounded away by the next update

    found = {}
    for stage in range(4):
        with Faulty(act=flip) as run:
            options = [f"zero_optimization.stage={stage}", "megagpt.guards.compare_every=3", "megagpt.every.log=1"]
            found[f"stage {stage}"] = run.train(dataset, folder / f"{stage}", *options)["message"]
    with Faulty(act=flip) as run:  # at stage 0 it stays, and is found later too
        options = ["zero_optimization.stage=0", "megagpt.guards.compare_every=5"]
        found["later"] = run.train(dataset, folder / "later", *options)["message"]
    return found


def an_output_that_is_not_finite(dataset: Path, folder: Path) -> dict[str, Any]:
    """On rank 1 alone, when it samples, at stage 3 with no parameter that every rank keeps whole."""

    def spoil(step: int, engine: Any) -> None:
        engine.module.ln_f.register_forward_hook(lambda module, args, x: x if module.training else x * float("nan"))

    none_kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    sharded = at_stage(3, *(f"zero_optimization.stage3_{key}=0" for key in none_kept))
    with Faulty(act=spoil) as run:
        return run.train(dataset, folder / "run", *sharded, "megagpt.every.sample=1", stop_at=1)


def memory_that_grows(dataset: Path, folder: Path) -> list[str]:
    kept = []
    window, memory_growth.WINDOW = memory_growth.WINDOW, 2
    with Faulty(act=lambda step, engine: kept.append(torch.ones(2**22))) as run:  # 16 MiB
        said = run.train(dataset, folder / "run", "megagpt.every.log=1", "megagpt.guards.memory_growth_mib=20")["said"]
    memory_growth.WINDOW = window
    return [line for line in said if "memory of rank" in line]


SCENARIOS = [
    one_step_that_is_not_finite,
    three_steps_in_a_row_that_are_not_finite,
    a_shard_that_is_not_finite,
    an_older_step_that_is_not_finite,
    a_spike,
    spikes_left_out,
    rolled_back,
    stopped_beside_a_save,
    a_bit_that_flipped,
    an_output_that_is_not_finite,
    memory_that_grows,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
