"""The lock of a run's folder: the first of two starts trains, the second is refused. Rank 0 holds it for all ranks.

Commands that only read a run take no lock.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from megagpt.checkpoint.commit import folder
from megagpt.distributed.collectives import errors_on_every_rank
from megagpt.distributed.process_group import is_main, print_rank0
from megagpt.errors import UserError, writing_to
from megagpt.file_lock import LOCK, FileLock, LockHeldError

# A restart by torchrun or Slurm waits for this many seconds until the ranks before it have ended. An NFS server keeps
# the lock of a host that crashed for its lease, usually 90 seconds.
WAIT_SECONDS = 120.0
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class RunLock:
    """Use it in a `with` block around all that writes to `out_dir`. Entering it raises UserError. Collective."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self._lock = FileLock(out_dir / LOCK)
        self._made: list[Path] = []  # folders, the lowest first

    def __enter__(self) -> Self:
        with errors_on_every_rank():
            if is_main():
                self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if not is_main():
            return
        with suppress(OSError):
            if self._lock.is_held() and os.listdir(self.out_dir) == [LOCK]:
                self._lock.path.unlink()  # a refused run file leaves nothing behind
                for made in self._made:
                    made.rmdir()
        with suppress(OSError):
            self._lock.release()

    def check(self) -> None:
        """Raise UserError if the run no longer has its folder. Collective."""
        with errors_on_every_rank(), writing_to(self.out_dir):
            if is_main():
                self._check()

    @contextmanager
    def archived_run(self, *in_use: Path | None) -> Iterator[None]:
        """Rename an old run's folder, so that a new run can use its name; rename it back if the `with` block fails.

        Both folders are locked until the block ends. `in_use`: paths that must not change their names. Collective;
        raises UserError.
        """
        archive, old_lock = None, self._lock
        try:
            with errors_on_every_rank():
                if is_main():
                    archive = self._archive([Path.cwd(), *filter(None, in_use)])
                    if archive:
                        self._lock = FileLock(self.out_dir / LOCK)
                        self._take()
            yield
        except Exception:
            if archive:
                self._bring_back(archive, old_lock)
            raise
        if archive:
            old_lock.release()

    def _take(self) -> None:
        target = Path(os.path.realpath(self.out_dir))  # a link may name a folder that is still to be made
        with writing_to(self.out_dir):
            self._made = [path for path in (target, *target.parents) if not path.exists()]
            target.mkdir(parents=True, exist_ok=True)
            try:
                warning = self._take_or_wait()
            except LockHeldError as held:
                raise UserError(
                    f"megagpt.out_dir={self.out_dir} is in use by another run, {held}; stop that one (kill saves "
                    "first), or give another megagpt.out_dir. If its host is down for good, delete "
                    f"{self._lock.path}"
                ) from None
        if warning:
            print_rank0(f"{warning}, so a second run in megagpt.out_dir={self.out_dir} may not be refused: start none")

    def _take_or_wait(self) -> str:
        try:
            return self._lock.take()
        except LockHeldError as held:
            if all(os.environ.get(name, "0") == "0" for name in RESTARTS):
                raise
            print_rank0(f"waiting up to {WAIT_SECONDS:.0f} s for the attempt before this one to end ({held})")
            return self._lock.take(WAIT_SECONDS)

    def _check(self) -> None:
        if self._lock.is_held():
            return
        if self._lock.path.exists():
            raise UserError(
                f"megagpt.out_dir={self.out_dir} was renamed or deleted while this run trained, and another run has "
                "begun there; this run ends without saving, and resumes where its own folder is now"
            )
        self._take()

    def _archive(self, in_use: list[Path]) -> Path | None:
        """Return what an old run's folder is called now; None if there is no old run."""
        target = Path(os.path.realpath(self.out_dir))
        if not ((target / "run.json").is_file() or folder(target).is_dir()):
            return None
        for path in in_use:
            if Path(os.path.realpath(path)).is_relative_to(target):
                raise UserError(
                    f"--fresh renames megagpt.out_dir={self.out_dir}, but {path} is in it and in use; give another "
                    "megagpt.out_dir, or start from another folder"
                )
        free = (target.with_name(f"{target.name}.old{n}") for n in count(1))
        archive = next(path for path in free if not path.exists())
        try:
            target.rename(archive)
        except OSError as error:
            raise UserError(f"--fresh cannot rename {target}: {error}; give another megagpt.out_dir") from error
        print_rank0(f"the old run is now {archive}")
        return archive

    def _bring_back(self, archive: Path, old_lock: FileLock) -> None:
        """Give the old run its name back, and delete what the new start left there."""
        target = Path(os.path.realpath(self.out_dir))
        refused = None
        try:
            if self._lock.is_held():  # else another start was faster, or there is no folder yet
                refused = Path(mkdtemp(prefix=f"{target.name}.refused_", dir=target.parent))
                target.rename(refused)
            archive.rename(target)
        except OSError as error:
            print_rank0(f"the old run stays {archive}: {error}")
            old_lock.release()
        else:
            self._lock.release()
            self._lock, self._made = old_lock, []
            print_rank0(f"this start did not succeed, so the old run is {target} again")
        finally:
            if refused:
                shutil.rmtree(refused, ignore_errors=True)
