"""kill -9 of a real process at the n-th change that an asynchronous save makes on disk, and then the command again.

Every attempt is forked from one process that has imported everything and computed nothing. Prints a line of JSON each.
"""

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from support import debug_run

from megagpt.checkpoint.commit import committed, damage_of
from megagpt.cli.verify_resume import what_differs
from megagpt.distributed.process_group import init_process_group
from megagpt.train.trainer import train

STRUCK = "step_00000006"  # its save is the third: one that has older steps to remove
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}  # audit events
OPTIONS = [
    "megagpt.save_async=true",
    "megagpt.regularization.dropout=0.1",
    "megagpt.data.val_tokens=128",
    'megagpt.schedule={"max_steps": 9}',
    'megagpt.every={"log": 1, "eval": 5, "save": 2}',
    "megagpt.early_stopping.restore_best=false",
]


def killed_at(n: int, dataset: Path, folder: Path) -> dict[str, Any]:
    run, straight = folder / "run", folder / "straight"
    shutil.rmtree(run, ignore_errors=True)
    status = _forked(lambda: _train(dataset, run, folder / "first", before=lambda: _die_before_change(n, folder)))
    newest = committed(run)[-1]
    damaged = [damage for path in committed(run) if (damage := damage_of(path, 0))]
    _forked(lambda: _train(dataset, run, folder / "again"))
    again = (folder / "again").read_text()
    return {
        "killed": os.WIFSIGNALED(status),
        "before": (folder / "struck").read_text() if os.WIFSIGNALED(status) else "",
        "newest": newest.name,
        "damaged": damaged,
        "resumed_there": f"resuming from {newest}\n" in again or newest.name == "step_00000009",
        "differs": list(what_differs(straight, run)),
    }


def _forked(work: Callable[[], None]) -> int:
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _train(dataset: Path, out_dir: Path, output: Path, before: Callable[[], None] = lambda: None) -> None:
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    device = init_process_group()
    before()
    train(debug_run(dataset, out_dir, *OPTIONS), device)
    sys.stdout.flush()


def _die_before_change(n: int, folder: Path) -> None:
    """SIGKILL to this process at the n-th change, from when the struck step's folder is made."""
    changes, begun = count(), False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal begun
        if event not in CHANGES or not isinstance(args[0], str | Path):
            return
        path = str(args[0])
        begun = begun or (event == "os.mkdir" and path.endswith(STRUCK))
        ours = "/checkpoints/" in path or "/committed" in path
        writes = event != "open" or (isinstance(args[1], str) and "w" in args[1])
        if begun and ours and writes and next(changes) == n:
            os.write(struck, f"{event} {path}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    struck = os.open(folder / "struck", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def main(dataset: Path, folder: Path, every: int) -> None:
    """Strike at change 0, `every`, 2 * `every`, ... until the run comes to its end unharmed."""
    gc.freeze()  # no collection in a fork then looks at, and so copies, what was imported
    assert _forked(lambda: _train(dataset, folder / "run", folder / "first")) == 0, (folder / "first").read_text()
    (folder / "run").rename(folder / "straight")
    for n in count(0, every):
        found = killed_at(n, dataset, folder)
        if not found["killed"]:
            break
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
