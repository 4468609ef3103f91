"""What is done to a run, and what counts as coming through. Groups have the letters of RESULTS.md.

A case begins where the straight run was, strikes, starts again without the fault, and is judged by the straight run.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
from corrupt import flip, truncate, zero
from lab import Blow, Ended
from strike import PHASES, InSave, at_most, signal_to
from systems import INTERVAL, STEPS, Megagpt, System

RECOVERED, REFUSED, WRONG, STUCK, RESTARTED, NOT_STRUCK = (
    "recovered",
    "refused",
    "silently wrong",
    "stuck",
    "restarted at step 0",
    "not struck",
)


@dataclass(frozen=True)
class Outcome:
    verdict: str
    note: str = ""  # what is not as promised; empty if all is
    lost: int | None = None  # steps trained again
    seconds: float | None = None  # from the fault until no process was left
    orphans: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    run: Callable[[System, Path], Outcome]
    baseline: bool = False  # means something on bare DeepSpeed too


def started_again(system: System, folder: Path, stage: int, steps: int, died: Ended, promised: str = "") -> Outcome:
    """Start the run in `folder` again, and judge it. `promised`: what it must print."""
    run_dir, newest = folder / "run", system.newest(folder / "run")
    trained = max([newest, *_steps_in(died.text)])
    again = lab.launch(system.program(run_dir, stage, steps), folder / "again")
    orphans = died.orphans + again.orphans
    result = partial(Outcome, seconds=died.seconds, orphans=orphans)
    if again.hung or again.code:
        return result(STUCK, f"hung: {again.hung}, code {again.code}: {_last_lines(again.text)}")
    resumed_at = system.resumed_at(again.text)
    resumed_at = trained if resumed_at is None else resumed_at
    if newest > 0 and resumed_at == 0:
        return result(RESTARTED, f"step {newest} was whole", lost=trained)
    if difference := system.difference(run_dir, stage, steps):
        return result(WRONG, difference)
    complaints = []
    if died.hung:
        complaints.append("hung")
    if orphans:
        complaints.append(f"{orphans} orphans")
    if trained - resumed_at > INTERVAL:
        complaints.append(f"{trained - resumed_at} steps lost")
    if promised not in again.text:
        complaints.append(f"{promised!r} is not in {_last_lines(again.text)}")
    return result(RECOVERED, "; ".join(complaints), lost=trained - resumed_at)


def _steps_in(text: str) -> list[int]:
    """The numbers of the training steps that were logged."""
    return [int(number) for number in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


def _last_lines(text: str) -> str:
    errors = [line for line in text.splitlines() if "Error" in line or line.startswith("error: ")]
    return " | ".join(errors[-2:] or text.splitlines()[-2:])[:400]


# --- A: kill -9 at a point of a save ---------------------------------------------------------------------------------


def killed_in_save(
    target: str, phase: str, victim: str, stage: int, first: bool, system: System, folder: Path
) -> Outcome:
    begin, steps = (0, 4) if first else (4, STEPS)
    system.begin(folder / "run", stage, begin)

    def arm(rank: int) -> None:
        launcher = victim == "launcher"
        if rank == (0 if launcher else int(victim)):
            strike = signal_to(os.getppid() if launcher else os.getpid(), folder / "dead" / "fault_at")
            InSave(target, phase, strike).arm()

    died = lab.launch(system.program(folder / "run", stage, steps), folder / "dead", arm=arm)
    if not (folder / "dead" / "fault_at").exists():
        return Outcome(NOT_STRUCK, _last_lines(died.text))
    return started_again(system, folder, stage, steps, died)


def kills_in_save() -> Iterator[Case]:
    for stage in range(4):
        for target in ("model", "optim", "rng", "manifest", "COMMIT", "latest", "rotation"):
            for phase in PHASES:
                for victim in ("0", "1", "launcher"):
                    for first in (True, False):
                        if _writes(target, victim, stage, first) and (victim != "launcher" or phase == "half"):
                            name = (
                                f"{victim} killed {phase} {target}, stage {stage}, {'first' if first else 'later'} save"
                            )
                            run = partial(killed_in_save, target, phase, victim, stage, first)
                            yield Case("A", name, run, baseline=target in ("model", "optim", "latest"))


def _writes(target: str, victim: str, stage: int, first: bool) -> bool:
    """Whether that rank writes such a file (for a launcher: rank 0)."""
    if target == "rotation" and first:
        return False
    if target == "optim" and stage == 0:
        return False  # in fp32 it lies in the model's file
    return victim != "1" or target in ("optim", "rng", "manifest") or (target == "model" and stage == 3)


# --- B: kill -9 at a random time -------------------------------------------------------------------------------------


def killed_at_random(seed: int, system: System, folder: Path) -> Outcome:
    """While it starts, loads, trains or saves; every third time once more while it comes back."""
    rng = random.Random(seed)
    stage, begin = seed % 4, rng.choice((0, 4))
    system.straight(stage)
    system.begin(folder / "run", stage, begin)
    program = system.program(folder / "run", stage)
    died = Ended([], "", 0.0)
    for attempt in range(2 if seed % 3 == 0 else 1):
        blow = Blow(rng.choice(("0", "1", "ranks", "launcher")), rng.uniform(0.1, 1.1) * system.seconds[stage])
        last = lab.launch(program, folder / f"dead{attempt}", blow=blow)
        died = Ended(last.codes, died.text + last.text, max(died.seconds, last.seconds), last.orphans, last.hung)
    return started_again(system, folder, stage, STEPS, died)


def random_kills() -> Iterator[Case]:
    for seed in range(200):
        yield Case("B", f"seed {seed}, stage {seed % 4}", partial(killed_at_random, seed), baseline=seed < 100)


# --- C: signals ------------------------------------------------------------------------------------------------------


def signaled(number: int, victim: str, again_in_save: int, system: System, folder: Path) -> Outcome:
    """One commit, by all ranks at the same step, and code 75; `again_in_save`: one more while COMMIT is written."""
    assert isinstance(system, Megagpt)
    options = ['megagpt.every={"log": 1, "eval": 0, "save": 0}']

    def arm(rank: int) -> None:
        if again_in_save:
            InSave("COMMIT", "half", lambda: os.kill(os.getpid(), again_in_save)).arm()

    blow = Blow(victim, " 3/100000 ", number)
    died = lab.launch(system.program(folder / "run", 1, 100_000, *options), folder / "dead", blow=blow, arm=arm)
    found = list((folder / "run" / "checkpoints").glob("step_*/COMMIT"))
    complaints = []
    if died.codes != [75, 75]:
        complaints.append(f"codes {died.codes}: {_last_lines(died.text)}")
    if len(found) != 1:
        complaints.append(f"{len(found)} commits")
    if died.hung or died.orphans:
        complaints.append(f"hung: {died.hung}, orphans: {died.orphans}")
    if not found:
        return Outcome(STUCK, "; ".join(complaints), orphans=died.orphans)
    at = system.newest(folder / "run")
    again = lab.launch(system.program(folder / "run", 1, at + 2, *options), folder / "again")
    lost = max(_steps_in(died.text)) - at
    verdict = RECOVERED if again.code == 0 and system.resumed_at(again.text) == at else STUCK
    return Outcome(verdict, "; ".join(complaints), lost=lost, seconds=died.seconds, orphans=died.orphans)


def signals() -> Iterator[Case]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in numbers:
        for victim in ("0", "1", "ranks", "group"):
            if (number, victim) != (signal.SIGUSR1, "group"):  # which would end the launcher by default
                yield Case("C", f"{number.name} to {victim}", partial(signaled, number, victim, 0))
    for number in (signal.SIGTERM, signal.SIGINT):
        yield Case("C", f"{number.name} to launcher", partial(signaled, number, "launcher", 0))
    yield Case("C", "SIGKILL to launcher", partial(signaled, signal.SIGKILL, "launcher", 0))
    for number in numbers:
        yield Case("C", f"SIGTERM to 0, {number.name} in the save", partial(signaled, signal.SIGTERM, "0", number))
    yield Case("C", "SIGINT to group, SIGTERM in the save", partial(signaled, signal.SIGINT, "group", signal.SIGTERM))


# --- D: damage -------------------------------------------------------------------------------------------------------


def empty(content: bytearray, rng: random.Random) -> None:
    content.clear()


DAMAGES = {"flip": flip, "zero 4 KiB": zero, "truncate": truncate, "empty": empty}
FILES = {
    "model": "*model_states.pt",
    "optim 0": "*zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "optim 1": "*zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng 1": "rng.1.json",
    "manifest 0": "manifest.0.json",
    "manifest 1": "manifest.1.json",
    "COMMIT": "COMMIT",
    "tokenizer": "tokenizer.model",
}


def damaged(damage: str, file: str, stage: int, system: System, folder: Path) -> Outcome:
    """The newest step rots: the run goes on from the one before, and names the file."""
    run_dir = folder / "run"
    system.begin(run_dir, stage, 4)
    step_dir = system.files(run_dir, 4)
    victim = sorted(step_dir.glob(FILES[file]))[0]
    if damage == "delete":
        victim.unlink()
    elif damage == "swap with the other rank's":
        other = next(path for path in step_dir.glob("*zero_pp_rank_1*optim_states.pt"))
        one, two = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(two)
        other.write_bytes(one)
    elif damage == "of the step before":
        shutil.copy(system.files(run_dir, 2) / victim.name, victim)
    else:
        content = bytearray(victim.read_bytes())
        DAMAGES[damage](content, random.Random(stage))
        victim.write_bytes(content)
    promised = victim.name if isinstance(system, Megagpt) and file != "COMMIT" else ""
    return started_again(system, folder, stage, STEPS, Ended([], "step 4/8", 0.0), promised)


def damages() -> Iterator[Case]:
    for stage in (1, 2, 3):
        for file in FILES:
            for damage in (*DAMAGES, "delete", "of the step before"):
                if stage != 2 or file.startswith(("model", "optim")):
                    run = partial(damaged, damage, file, stage)
                    yield Case(
                        "D", f"{damage}: {file}, stage {stage}", run, baseline=file.startswith(("model", "optim"))
                    )
        run = partial(damaged, "swap with the other rank's", "optim 0", stage)
        yield Case("D", f"swap: optim of both ranks, stage {stage}", run, baseline=True)


def data_damaged(damage: str, pattern: str, system: System, folder: Path) -> Outcome:
    """A dataset rots: refused by name, or what is damaged is not read and the run is the straight one."""
    assert isinstance(system, Megagpt)
    system.begin(folder / "run", 1, 4)
    shutil.copytree(system.dataset, folder / "corpus")
    victim = sorted((folder / "corpus").glob(pattern))[0]
    content = bytearray(victim.read_bytes())
    DAMAGES[damage](content, random.Random(1))
    victim.write_bytes(content)
    here = Megagpt(folder / "corpus", system.home)
    ended = lab.launch(here.program(folder / "run", 1), folder / "again")
    if ended.code == 2 and "Traceback" not in ended.text:
        return Outcome(REFUSED, "" if victim.name in ended.text else f"not named: {_last_lines(ended.text)}")
    if ended.code or ended.hung:
        return Outcome(STUCK, _last_lines(ended.text))
    difference = here.difference(folder / "run", 1, STEPS)
    return Outcome(WRONG, difference) if difference else Outcome(RECOVERED)


def data_damages() -> Iterator[Case]:
    for pattern in ("manifest.json", "index.arrow", "tokenizer.model", "train/v0/*.arrow", "val/v0/*.arrow"):
        for damage in DAMAGES:
            yield Case("D", f"{damage}: dataset {pattern}", partial(data_damaged, damage, pattern))


# --- E: a full disk --------------------------------------------------------------------------------------------------


def full(n_bytes: int, victims: str, stage: int, system: System, folder: Path) -> Outcome:
    """No file longer than that on one rank or both: one message and code 2; then there is room again."""
    system.begin(folder / "run", stage, 4)

    def arm(rank: int) -> None:
        if str(rank) in victims:
            at_most(n_bytes)

    died = lab.launch(system.program(folder / "run", stage), folder / "dead", arm=arm)
    outcome = started_again(system, folder, stage, STEPS, died)
    if isinstance(system, Megagpt) and not outcome.note and (died.code != 2 or "could not be saved" not in died.text):
        return Outcome(outcome.verdict, f"code {died.code}: {_last_lines(died.text)}", outcome.lost, outcome.seconds)
    return outcome


def full_disks() -> Iterator[Case]:
    for stage in (0, 1, 3):
        for victims in ("0", "1", "01"):
            for n_bytes in (4_000, 12_000, 40_000):
                if not (victims == "1" and n_bytes > 4_000):  # whose files are all shorter
                    run = partial(full, n_bytes, victims, stage)
                    yield Case("E", f"{n_bytes} bytes on {victims}, stage {stage}", run, baseline=True)


# --- H: a run that is not the one that was saved ---------------------------------------------------------------------


def mismatched(override: str, promised: str, system: System, folder: Path) -> Outcome:
    assert isinstance(system, Megagpt)
    system.begin(folder / "run", 1, 4)
    ended = lab.launch(system.program(folder / "run", 1, STEPS, *json.loads(override)), folder / "again")
    if ended.hung or "Traceback" in ended.text:
        return Outcome(STUCK, _last_lines(ended.text), seconds=ended.seconds)
    if ended.code == 2:
        note = "" if promised in ended.text else _last_lines(ended.text)
        note += "" if system.newest(folder / "run") == 4 else "; the checkpoint is not as it was"
        return Outcome(REFUSED, note, seconds=ended.seconds)
    return Outcome(WRONG, f"accepted with code {ended.code}")


MISMATCHES = [
    ("megagpt.model.n_layer=2", "n_layer"),
    ("megagpt.model.n_head=4", "n_head"),
    ("megagpt.model.n_embd=64", "n_embd"),
    ("megagpt.model.seq_len=64", "seq_len"),
    ("megagpt.data.seed=9", "seed"),
    ("megagpt.data.train.0.path=nowhere", "nowhere"),
    ("megagpt.data.val=nowhere", "nowhere"),
    ("megagpt.data.seq_len=33", "seq_len"),
    ("megagpt.regularization.weight_decay_on=all", "weight_decay_on"),
    ("train_batch_size=5", "train_batch_size"),
    ("train_batch_size=0", "train_batch_size"),
    ("train_micro_batch_size_per_gpu=3", "train_batch_size"),
    ("gradient_cliping=1", "gradient_clipping"),
    ("zero_optimization.stag=1", "'stage'"),
    ("zero_optimization.stage=4", "stage"),
    ("optimizer.params.lrr=1", "lr"),
    ("optimizer.params.lr=-1", "lr"),
    ("optimizer.params.betas=[0.9,1.5]", "beta"),
    ("optimizer.type=Adagrad", "Adagrad"),
    ("megagpt.modle={}", "model"),
    ("megagpt.model.n_layers=3", "n_layer"),
    ("megagpt.data.vals=x", "val"),
    ("megagpt.every.logs=3", "log"),
    ("megagpt.schedule.max_steps=0", "max_steps"),
    ("megagpt.schedule.warmup_steps=-1", "warmup_steps"),
    ("megagpt.keep.last=1", "last"),
    ("megagpt.early_stopping.patients=3", "patience"),
    ("megagpt.regularization.dropout=1.5", "dropout"),
    ("fp16.enabled=true", "fp16"),
]


def mismatches() -> Iterator[Case]:
    for override, promised in MISMATCHES:
        yield Case("H", override, partial(mismatched, json.dumps([override]), promised))


# --- J: exact resume -------------------------------------------------------------------------------------------------


def resumed_exactly(options: tuple[str, ...], stage: int, cut: int, system: System, folder: Path) -> Outcome:
    """Straight, and cut once or twice in a row."""
    assert isinstance(system, Megagpt)
    for out_dir, ends in (("straight", [STEPS]), ("run", [cut, *([cut + 1] if cut % 2 else []), STEPS])):
        for steps in ends:
            program = system.program(folder / out_dir, stage, steps, "megagpt.keep.last=3", *options)
            ended = lab.launch(program, folder / f"log-{out_dir}{steps}")
            if ended.code:
                return Outcome(STUCK, _last_lines(ended.text))
    other = Megagpt(system.dataset, folder)
    (folder / "straight").rename(folder / f"straight{stage}")
    difference = other.difference(folder / "run", stage, STEPS)
    return Outcome(WRONG, difference) if difference else Outcome(RECOVERED, lost=0)


EXACT = {
    "fp32": [],
    "bf16": ["bf16.enabled=true"],
    "full recompute": ["megagpt.recompute.policy=full"],
    "accumulation 2": ["train_micro_batch_size_per_gpu=1"],
    "patience": ['megagpt.early_stopping={"patience": 3, "min_delta": 100, "restore_best": false}'],
}


def exact_resumes() -> Iterator[Case]:
    for stage in range(4):
        for name, options in EXACT.items():
            for cut in (4,) if name == "patience" else (3, 4):  # the end of a run is evaluated too
                run = partial(resumed_exactly, tuple(options), stage, cut)
                yield Case("J", f"{name}, stage {stage}, cut at {cut}", run)


def every_case() -> list[Case]:
    groups = (
        kills_in_save,
        random_kills,
        signals,
        damages,
        data_damages,
        full_disks,
        mismatches,
        exact_resumes,
    )
    return [case for group in groups for case in group()]
