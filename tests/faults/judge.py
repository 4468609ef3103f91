"""What counts as coming through: a run that was struck is started again and compared with the straight one."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
from lab import Ended
from systems import INTERVAL, System

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


def started_again(
    system: System, folder: Path, stage: int, steps: int, died: Ended, promised: str = "", at_most: int = INTERVAL
) -> Outcome:
    """Start the run in `folder` again, and judge it. `promised`: what it must print; `at_most`: steps it may lose."""
    run_dir, newest = folder / "run", system.newest(folder / "run", stage)
    trained = max([newest, *steps_in(died.text)])
    again = lab.launch(system.program(run_dir, stage, steps), folder / "again")
    orphans = died.orphans + again.orphans
    result = partial(Outcome, seconds=died.seconds, orphans=orphans)
    if again.hung or again.code:
        return result(STUCK, f"hung: {again.hung}, code {again.code}: {last_lines(again.text)}")
    resumed_at = system.resumed_at(again.text)
    resumed_at = trained if resumed_at is None else resumed_at
    if newest > 0 and resumed_at == 0 and trained > INTERVAL:
        return result(RESTARTED, f"step {newest} was whole", lost=trained)
    if difference := system.difference(run_dir, stage, steps):
        return result(WRONG, difference)
    complaints = []
    if died.hung:
        complaints.append("hung")
    if orphans:
        complaints.append(f"{orphans} orphans")
    if trained - resumed_at > at_most:
        complaints.append(f"{trained - resumed_at} steps lost")
    if promised not in again.text:
        complaints.append(f"{promised!r} is not in {last_lines(again.text)}")
    return result(RECOVERED, "; ".join(complaints), lost=trained - resumed_at)


def steps_in(text: str) -> list[int]:
    """The numbers of the training steps that were logged."""
    return [int(number) for number in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


def last_lines(text: str) -> str:
    errors = [line for line in text.splitlines() if "Error" in line or line.startswith("error: ")]
    return " | ".join(errors[-2:] or text.splitlines()[-2:])[:400]
