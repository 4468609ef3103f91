"""Groups A, B and C: kill -9 at a point of a save and at any time, and the signals that ask for one more save."""

import math
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lab
from judge import NOT_STRUCK, RECOVERED, STUCK, Case, Outcome, last_lines, started_again, steps_in
from lab import Blow, Ended
from numerics import times
from strike import PHASES, InSave, signal_to
from systems import INTERVAL, STEPS, Megagpt, System

# --- A: kill -9 at a point of a save ---------------------------------------------------------------------------------


def killed_in_save(
    target: str, phase: str, victim: str, stage: int, first: bool, beside: bool, system: System, folder: Path
) -> Outcome:
    """`beside`: megagpt saves beside training, which by the kill may be one more save interval ahead."""
    begin, steps = (0, 4) if first else (4, STEPS)
    system.begin(folder / "run", stage, begin)

    def arm(rank: int) -> None:
        launcher = victim == "launcher"
        if rank == (0 if launcher else int(victim)):
            strike = signal_to(os.getppid() if launcher else os.getpid(), folder / "dead" / "fault_at")
            InSave(target, phase, strike).arm()

    more = ["megagpt.save_async=true"] if beside else []
    died = lab.launch(system.program(folder / "run", stage, steps, *more), folder / "dead", arm=arm)
    if not (folder / "dead" / "fault_at").exists():
        return Outcome(NOT_STRUCK, last_lines(died.text))
    return started_again(system, folder, stage, steps, died, at_most=INTERVAL * (1 + beside))


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
                            known = target in ("model", "optim", "latest")
                            yield Case("A", name, partial(run, False), baseline=known)
                            if stage in (1, 3) and not first:
                                yield Case("A", f"{name} beside training", partial(run, True))
        for victim in ("0", "1"):
            name = f"{victim} killed beside training, when a guard has stopped it, stage {stage}"
            yield Case("A", name, partial(killed_after_a_guard, victim, stage))


def killed_after_a_guard(victim: str, stage: int, system: System, folder: Path) -> Outcome:
    """A rank dies before it has written its files of step 6, when a guard has stopped all of them at step 7."""
    system.begin(folder / "run", stage, 4)

    def arm(rank: int) -> None:
        times(math.nan, 7)(folder / "dead" / "stopped_at")
        if str(rank) == victim:
            kill = signal_to(os.getpid(), folder / "dead" / "fault_at")

            def strike() -> None:
                time.sleep(2)  # the stop comes sooner, and the other rank writes its files
                kill()

            InSave("rng", "before", strike).arm()

    more = ["megagpt.save_async=true", "megagpt.guards.max_bad_steps=1"]
    died = lab.launch(system.program(folder / "run", stage, STEPS, *more), folder / "dead", arm=arm)
    if not (folder / "dead" / "fault_at").exists():
        return Outcome(NOT_STRUCK, last_lines(died.text))
    return started_again(system, folder, stage, STEPS, died, at_most=2 * INTERVAL)


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
            InSave("COMMIT", "before", lambda: os.kill(os.getpid(), again_in_save)).arm()

    blow = Blow(victim, " 3/100000 ", number)
    died = lab.launch(system.program(folder / "run", 1, 100_000, *options), folder / "dead", blow=blow, arm=arm)
    found = list((folder / "run" / "checkpoints").glob("step_*/COMMIT"))
    complaints = []
    if died.codes != [75, 75]:
        complaints.append(f"codes {died.codes}: {last_lines(died.text)}")
    if len(found) != 1:
        complaints.append(f"{len(found)} commits")
    if died.hung or died.orphans:
        complaints.append(f"hung: {died.hung}, orphans: {died.orphans}")
    if not found:
        return Outcome(STUCK, "; ".join(complaints), orphans=died.orphans)
    at = system.newest(folder / "run", 1)
    again = lab.launch(system.program(folder / "run", 1, at + 2, *options), folder / "again")
    lost = max(steps_in(died.text)) - at
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
