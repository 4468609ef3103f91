"""Groups F, H, J, K and L: hangs, other run files, exact resume, crash loops, hostile files."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lab
import torch
from judge import RECOVERED, REFUSED, STUCK, WRONG, Case, Outcome, last_lines, started_again
from lab import Blow
from systems import STEPS, Megagpt, System
from test_security import Gadget, sign_again

from megagpt.distributed.hostfile import check_hosts, check_settings
from megagpt.engine import build
from megagpt.errors import UserError
from megagpt.train import trainer

# --- F: a hang -------------------------------------------------------------------------------------------------------

HANG_SECONDS = 5


def hanging(how: str, victim: int, stage: int, system: System, folder: Path) -> Outcome:
    """Seen by the watchdog of at least one rank, which writes where it stood; then the run goes on."""
    system.begin(folder / "run", stage, 4)

    def arm(rank: int) -> None:
        original, steps = trainer.train_step, 0

        def train_step(*args: object) -> object:
            nonlocal steps
            steps += 1
            if steps == 3 and rank == victim:
                (folder / "dead" / "fault_at").touch()
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "asleep":
                    time.sleep(1e6)
                else:
                    torch.distributed.barrier()  # which the others do not come to
            return original(*args)

        trainer.train_step = train_step

    program = system.program(folder / "run", stage, STEPS, f"megagpt.guards.hang_timeout={HANG_SECONDS}")
    died = lab.launch(program, folder / "dead", arm=arm, timeout=180)
    outcome = started_again(system, folder, stage, STEPS, died)
    if not outcome.note and not list((folder / "run").glob("stacks.*.txt")):
        return Outcome(outcome.verdict, "no stacks were written", outcome.lost, outcome.seconds, outcome.orphans)
    return outcome


def hangs() -> Iterator[Case]:
    for how in ("stopped", "asleep", "in another collective"):
        for victim in (0, 1):
            for stage in (1, 3):
                yield Case("F", f"rank {victim} {how}, stage {stage}", partial(hanging, how, victim, stage))


# --- H: a run that is not the one that was saved ---------------------------------------------------------------------


def without_fp16(rank: int) -> None:
    """As on a processor that has no instructions for it, whatever this one has."""
    build.deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: False


def mismatched(override: str, promised: str, system: System, folder: Path) -> Outcome:
    assert isinstance(system, Megagpt)
    system.begin(folder / "run", 1, 4)
    program = system.program(folder / "run", 1, STEPS, *json.loads(override))
    ended = lab.launch(program, folder / "again", arm=without_fp16)
    if ended.hung or "Traceback" in ended.text:
        return Outcome(STUCK, last_lines(ended.text), seconds=ended.seconds)
    if ended.code == 2:
        note = "" if promised in ended.text else last_lines(ended.text)
        note += "" if system.newest(folder / "run", 1) == 4 else "; the checkpoint is not as it was"
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
                return Outcome(STUCK, last_lines(ended.text))
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


# --- K: a chain of restarts ------------------------------------------------------------------------------------------


def crash_loop(stage: int, system: System, folder: Path) -> Outcome:
    """Ranks that die before their first step each time: the fourth start says so and ends with 2."""
    system.begin(folder / "run", stage, 4)

    def arm(rank: int) -> None:
        trainer.train_step = lambda *args: os._exit(1)

    codes = [lab.launch(system.program(folder / "run", stage), folder / f"start{n}", arm=arm).code for n in range(5)]
    refused = (
        "restarts without progress" in (folder / f"start{codes.index(2)}" / "output").read_text()
        if 2 in codes
        else False
    )
    return Outcome(REFUSED if refused else STUCK, "" if codes[:3] == [1, 1, 1] else f"codes {codes}")


def two_jobs(stage: int, system: System, folder: Path) -> Outcome:
    """On one host at once, in folders of their own: one is killed, and the other is the straight run."""
    system.straight(stage)
    other = os.fork()
    if other == 0:
        code = lab.launch(system.program(folder / "run", stage), folder / "whole").code
        os._exit(code)
    killed = lab.launch(system.program(folder / "killed", stage), folder / "dead", blow=Blow("ranks", " 3/8 "))
    code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    difference = system.difference(folder / "run", stage, STEPS)
    if code or difference:
        return Outcome(WRONG if difference else STUCK, difference)
    return Outcome(RECOVERED, "" if killed.code else "the other was not killed", orphans=killed.orphans)


def launchers() -> Iterator[Case]:
    for stage in range(4):
        yield Case("K", f"crash loop, stage {stage}", partial(crash_loop, stage))
        yield Case("K", f"two jobs, stage {stage}", partial(two_jobs, stage))


# --- L: hostile files and names --------------------------------------------------------------------------------------


def program_in(pattern: str, signed: bool, stage: int, system: System, folder: Path) -> Outcome:
    """A pickle that would make a folder, in a file of the newest step; signed: with hashes to match."""
    system.begin(folder / "run", stage, 4)
    step_dir, made = system.files(folder / "run", 4), folder / "made"
    file = sorted(step_dir.glob(pattern))[0]
    content = torch.load(file, weights_only=False)  # of our own run of a moment ago
    torch.save({**content, "more": Gadget(made)}, file)
    if signed:
        sign_again(step_dir)
    ended = lab.launch(system.program(folder / "run", stage), folder / "again")
    if made.exists():
        return Outcome(WRONG, "the program ran")
    if signed:
        refused = ended.code == 2 and f"{file.name} would call posix.mkdir" in ended.text
        return Outcome(REFUSED if refused else STUCK, "" if refused else last_lines(ended.text))
    difference = system.difference(folder / "run", stage, STEPS) if not ended.code else last_lines(ended.text)
    return Outcome(STUCK if difference else RECOVERED, difference)


NAMES = [
    "-oProxyCommand=id slots=1",
    "node1;id slots=1",
    "$(id) slots=1",
    "`id` slots=1",
    "node1 slots=1;id",
    "node1 slots=-1",
    "node1 slots=0",
    "node1 slots=1e3",
    "node1",
    "a b slots=1",
    "node1|id slots=1",
    "node1&&id slots=1",
    "../x slots=1",
    "user@node slots=1",
    "node1\tslots = 1",
    "nod\u00e91 slots=1",
    ".node slots=1",
    "node- slots=1",
    "'node' slots=1",
    "node1>x slots=1",
]
SETTINGS = [
    "A=$(id)",
    "A=1;id",
    "A=`id`",
    "A=a b",
    "A='x'",
    'A="x"',
    "A=x|y",
    "A=x>y",
    "-A=1",
    "A B=1",
    "A",
    "HF_TOKEN=1",
]


def named(kind: str, line: str, system: System, folder: Path) -> Outcome:
    folder.mkdir()
    file = folder / ("hosts" if kind == "hostfile" else ".deepspeed_env")
    file.write_text(line + "\n")
    with contextlib.suppress(UserError):
        check_hosts(file) if kind == "hostfile" else check_settings(file)
        return Outcome(WRONG, "accepted")
    return Outcome(REFUSED)


def hostile() -> Iterator[Case]:
    for stage in (0, 1, 2, 3):
        for pattern in ("*model_states.pt", *(("*rank_1*optim_states.pt",) if stage else ())):
            for signed in (True, False):
                name = f"program in {pattern}, {'signed' if signed else 'as found'}, stage {stage}"
                yield Case("L", name, partial(program_in, pattern, signed, stage))
    for kind, lines in (("hostfile", NAMES), (".deepspeed_env", SETTINGS)):
        for line in lines:
            yield Case("L", f"{kind}: {line}", partial(named, kind, line))
