"""Locks of folders: one run or one build writes to a folder at a time. Readers need no lock.

The lock is flock(2) on a file in the folder. The kernel releases it when its process ends, by kill -9 too, so that
nothing stale keeps the next start out. The file also says who holds it, for messages. It stays after the lock is
released: deleting it would let two processes lock two files of one name.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil

LOCK = "lock"  # the name of the file in a run's folder
HELD = (errno.EAGAIN, errno.EACCES)
POLL_SECONDS = 0.5  # flock has no timeout of its own


class LockHeldError(Exception):
    """Another process holds the lock; the text names it."""


class FileLock:
    """An exclusive lock that ends with this process, or at `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        # A forked process would keep the lock after this one has ended.
        os.register_at_fork(after_in_child=self._close)

    def take(self, patience: float = 0.0) -> str:
        """Lock the file, which is created if needed; wait at most `patience` seconds for its holder to end.

        Returns a warning if the file system cannot keep every other process out, else "". Raises LockHeldError, and
        OSError if the file cannot be written.
        """
        until = time.monotonic() + patience
        while True:
            self._file = self.path.open("ab")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in HELD:
                    return f"the file system of {self.path.parent} has no locks ({error.strerror})"
                self._close()
                if time.monotonic() >= until:
                    raise LockHeldError(_holder(self.path)) from None
                time.sleep(POLL_SECONDS)
                continue
            if self.is_held():
                break
            self._close()  # the file was deleted, or its folder renamed, after it was opened
        self._file.truncate(0)
        self._file.write(json.dumps(_me()).encode())
        self._file.flush()
        return _weakness(self.path.parent)

    def is_held(self) -> bool:
        """Tell whether the file of this name is still the one that was locked: its folder may have been renamed."""
        try:
            return self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            return False  # it is gone, or the path no longer leads to it

    def release(self) -> None:
        """Unlock the file, and leave it empty."""
        if self._file is not None:
            self._file.truncate(0)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_UN)  # also for a forked process that has not closed it yet
            self._close()

    def _close(self) -> None:
        """Close the file. In a forked process this unlocks nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _me() -> dict[str, object]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(path: Path) -> str:
    """Describe who holds the lock: its host, process and start, as far as the file can be read.

    A process that has just taken the lock has yet to replace what the one before it wrote.
    """
    for _ in range(50):
        time.sleep(0.02)
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_bytes())
            return f"process {int(found['pid'])} on host {str(found['host'])[:100]}, since {str(found['since'])[:30]}"
    return "a process that has just started"


def _weakness(folder: Path) -> str:
    """Return why other hosts may not see a lock in this folder; empty where they do, or see no such folder."""
    below, mounts = Path(os.path.realpath(folder)), []
    with suppress(OSError):
        mounts = [part for part in psutil.disk_partitions(all=True) if below.is_relative_to(part.mountpoint)]
    mount = max(reversed(mounts), key=lambda part: len(part.mountpoint), default=None)
    if mount is None or not locks_on_one_host(mount.fstype, set(mount.opts.split(","))):
        return ""
    return f"locks on {mount.mountpoint} ({mount.fstype}) hold on one host only"


def locks_on_one_host(fstype: str, options: set[str]) -> bool:
    """Tell whether flock on a shared file system of this kind, mounted with these options, is not seen elsewhere."""
    if fstype in ("nfs", "nfs4"):
        return not options.isdisjoint({"nolock", "local_lock=flock", "local_lock=all"})
    if fstype == "lustre":
        return "localflock" in options
    if fstype in ("cifs", "smb3"):
        return "nobrl" in options
    return fstype.startswith("fuse.") or fstype in ("9p", "virtiofs", "beegfs")
