"""Group E on real disks: a tmpfs of its own for each run, which is full, read-only or not ours to write to. As root."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lab
import psutil
from judge import RECOVERED, STUCK, WRONG, Case, Outcome, last_lines, started_again
from strike import InSave
from systems import STEPS, Megagpt, System

from megagpt.train import trainer

Arm = Callable[[int], None]
CAPABILITIES_3, DAC_OVERRIDE = 0x20080522, 1 << 1


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "faults", folder], check=True)
    try:
        yield folder
    finally:
        unmount(folder, keep=0)


def read_only(folder: Path) -> None:
    """Cover the disk by itself, read-only: one on which a file is open for writing cannot be mounted again as such."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def unmount(folder: Path, *, keep: int) -> None:
    """Unmount all that lies on a folder but the lowest `keep`."""
    mounted = [partition.mountpoint for partition in psutil.disk_partitions(all=True)].count(str(folder))
    for _ in range(mounted - keep):
        subprocess.run(["umount", "--lazy", folder], check=True)


def leave(folder: Path, n_bytes: int) -> None:
    """Fill the disk but for so much."""
    free = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - n_bytes)


def make_room(folder: Path) -> None:
    unmount(folder, keep=1)
    (folder / "filler").unlink(missing_ok=True)


def obey_rights() -> None:
    """Root may write where nobody may: no longer in this process."""
    header, data = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, data) == 0
    data[0] &= ~DAC_OVERRIDE
    assert libc.capset(header, data) == 0


def at_step(number: int, act: Callable[[], None]) -> None:
    """Before this one of the steps that the process trains."""
    original, steps = trainer.train_step, 0

    def train_step(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == number:
            act()
        return original(*args)

    trainer.train_step = train_step


def on_disk(arm: Callable[[Path, int], None], promised: str, stage: int, system: System, folder: Path) -> Outcome:
    """arm(disk, rank): one message and code 2; then there is room again, and the run is the straight one."""
    with disk(folder / "disk") as mounted:
        system.begin(mounted / "run", stage, 4)
        program = system.program(mounted / "run", stage)
        died = lab.launch(program, folder / "dead", arm=partial(arm, mounted))
        make_room(mounted)
        for path in (mounted / "run", *(mounted / "run").glob("checkpoints"), *mounted.glob("run/checkpoints/step_*")):
            path.chmod(0o755)
        outcome = started_again(system, mounted, stage, STEPS, died)
    as_promised = died.codes == [2, 2] and promised in died.text and "Traceback" not in died.text
    if isinstance(system, Megagpt) and not outcome.note and not as_promised:
        return Outcome(outcome.verdict, f"codes {died.codes}: {last_lines(died.text)}", outcome.lost, outcome.seconds)
    return outcome


def full(room: int, mounted: Path, rank: int) -> None:
    at_step(1, lambda: leave(mounted, room)) if rank == 0 else None


def full_from_the_start(mounted: Path, rank: int) -> None:
    leave(mounted, 0) if rank == 0 else None


def full_in_save(target: str, phase: str, room: int, mounted: Path, rank: int) -> None:
    InSave(target, phase, lambda: leave(mounted, room)).arm() if rank == 0 else None


def read_only_at_step_1(mounted: Path, rank: int) -> None:
    at_step(1, lambda: read_only(mounted)) if rank == 0 else None


def read_only_from_the_start(mounted: Path, rank: int) -> None:
    read_only(mounted)


def no_rights(where: str, mounted: Path, rank: int) -> None:
    obey_rights()
    (mounted / "run" / where).chmod(0o555)


def no_rights_for_rank_1(mounted: Path, rank: int) -> None:
    obey_rights()
    newest = mounted / "run" / "checkpoints" / "step_00000006"
    InSave("optim", "before", lambda: newest.chmod(0o555)).arm() if rank == 1 else None


# --- what does not end a run -----------------------------------------------------------------------------------------


def goes_on(
    arm: Callable[[Path, int], None],
    options: tuple[str, ...],
    promised: str,
    stage: int,
    system: System,
    folder: Path,
) -> Outcome:
    """To the end of the straight run, though not with all of its numbers."""
    assert isinstance(system, Megagpt)
    with disk(folder / "disk") as mounted:
        program = system.program(mounted / "run", stage, STEPS, *options)
        ended = lab.launch(program, folder / "log", arm=partial(arm, mounted))
        if ended.hung or ended.code:
            return Outcome(STUCK, f"code {ended.code}: {last_lines(ended.text)}", seconds=ended.seconds)
        if difference := system.other_end(mounted / "run", system.straight(stage), stage):
            return Outcome(WRONG, difference)
    return Outcome(RECOVERED, "" if promised in ended.text else f"{promised!r} was not said", lost=0)


def read_only_in_step_1(mounted: Path, rank: int) -> None:
    if rank == 0:
        at_step(1, lambda: read_only(mounted))
        at_step(2, lambda: make_room(mounted))


def full_tensorboard(mounted: Path, rank: int) -> None:
    """From the first page on: a file's last page is its own."""
    if rank == 0:
        board = mounted / "run" / "tensorboard"
        board.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "faults", board], check=True)
        at_step(1, lambda: leave(board, 0))


def disks() -> Iterator[Case]:
    if os.geteuid() != 0:
        return
    for stage in (0, 1, 3):
        for room in (0, 8 << 10, 64 << 10):
            run = partial(on_disk, partial(full, room), "could not be saved", stage)
            yield Case("E", f"disk with {room} bytes left, stage {stage}", run, baseline=room > 0)
        run = partial(on_disk, partial(full_in_save, "COMMIT", "after", 0), "could not be updated", stage)
        yield Case("E", f"disk full after COMMIT, stage {stage}", run)
        run = partial(goes_on, partial(full_in_save, "rotation", "before", 32 << 10), (), "", stage)
        yield Case("E", f"disk full at the rotation, stage {stage}", run)
        run = partial(on_disk, read_only_at_step_1, "could not be saved", stage)
        yield Case("E", f"disk read-only while it trains, stage {stage}", run)
        run = partial(goes_on, read_only_in_step_1, (), "metrics cannot be written", stage)
        yield Case("E", f"disk read-only for one step, stage {stage}", run)
        run = partial(goes_on, full_tensorboard, ("tensorboard.enabled=true",), "metrics cannot be written", stage)
        yield Case("E", f"TensorBoard's disk full, stage {stage}", run)
        run = partial(on_disk, partial(no_rights, "checkpoints"), "could not be saved", stage)
        yield Case("E", f"no right to write checkpoints, stage {stage}", run)
    for stage in (1, 3):
        run = partial(on_disk, no_rights_for_rank_1, "could not be saved", stage)
        yield Case("E", f"no right to write rank 1's files, stage {stage}", run)
    for name, arm in (("full", full_from_the_start), ("read-only", read_only_from_the_start)):
        yield Case("E", f"disk {name} from the start", partial(on_disk, arm, "cannot be written", 1))
    yield Case("E", "no right to write out_dir", partial(on_disk, partial(no_rights, "."), "cannot be written", 1))
