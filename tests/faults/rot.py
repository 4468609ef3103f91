"""Groups D and E: files that rot, and disks that are full."""

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lab
from corrupt_files import flip, truncate, zero
from judge import RECOVERED, REFUSED, STUCK, WRONG, Case, Outcome, last_lines, started_again
from lab import Ended
from strike import at_most
from systems import STEPS, Megagpt, System

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
            same = file == "tokenizer"  # in every step
            for damage in (*DAMAGES, "delete", *(() if same else ("of the step before",))):
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
        return Outcome(REFUSED, "" if victim.name in ended.text else f"not named: {last_lines(ended.text)}")
    if ended.code or ended.hung:
        return Outcome(STUCK, last_lines(ended.text))
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
        return Outcome(outcome.verdict, f"code {died.code}: {last_lines(died.text)}", outcome.lost, outcome.seconds)
    return outcome


def full_disks() -> Iterator[Case]:
    for stage in (0, 1, 3):
        for victims in ("0", "1", "01"):
            for n_bytes in (4_000, 12_000, 40_000):
                if not (victims == "1" and n_bytes > 4_000):  # whose files are all shorter
                    run = partial(full, n_bytes, victims, stage)
                    yield Case("E", f"{n_bytes} bytes on {victims}, stage {stage}", run, baseline=True)
