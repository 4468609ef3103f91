"""Append what a run prints to out_dir/train.log: a header for each start, then the same lines as in the terminal.

Lines that are printed before the run has its folder are kept until then; a refused start leaves no log.
"""

import os
import shlex
import socket
import sys
import traceback
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Self, TextIO

from megagpt import __version__
from megagpt.atomic_files import append_whole
from megagpt.distributed.rank_variables import OURS
from megagpt.terminal import copied_to, print_error

LOG = "train.log"  # the name of the file in a run's folder


class RunLog:
    """Use it in a `with` block around all that prints. Every rank has one, but only rank 0 prints more than errors.

    A log that cannot be written, as on a full disk, does not end a run.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._early: list[tuple[str, TextIO]] = []
        self._copying = ExitStack()
        self._failed = False

    def __enter__(self) -> Self:
        self._copying.enter_context(copied_to(self._take))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._copying.close()
        # Python prints it, once no `with` block is left. What follows from another rank's end, rank 0 reports alone.
        if self._file and error is not None and (_is_rank_0() or not is_broken_connection(error)):
            self._write("".join(traceback.format_exception(error)))

    def open(self, out_dir: Path) -> None:
        """Write the header and what was printed so far, and from now on each line as it is printed."""
        file, early = out_dir / LOG, self._early
        self._early = []
        if any(_leads_to(file, stream) for stream in (sys.stdout, sys.stderr)):
            self._copying.close()  # as in `megagpt train ... >> runs/mine/train.log`
            return
        self._file = file
        self._write((_header() if _is_rank_0() else "") + "".join(text for text, _ in early))

    def _take(self, text: str, stream: TextIO) -> None:
        if self._file is None:
            self._early.append((text, stream))
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            if text:
                append_whole(self._file, text.encode(errors="backslashreplace"))
        except OSError as error:
            if not self._failed:
                self._failed = True  # before it is printed, which comes here again
                print_error(f"{self._file} cannot be written ({error.strerror}); training continues without it")


def is_broken_connection(error: BaseException) -> bool:
    """Tell whether a rank failed because gloo lost its connection to another, which has ended."""
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def typed_command() -> str:
    """Return this process's command as a user types it; a header's, in a rank that `megagpt train` started, is its."""
    program = Path(sys.argv[0]).name
    return shlex.join(["megagpt" if program == "__main__.py" else program, *sys.argv[1:]])


def _header() -> str:
    command = os.environ.get(OURS) or typed_command()
    ranks = os.environ.get("WORLD_SIZE", "1")
    began = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    who = f"megagpt {__version__} on {socket.gethostname()}, process {os.getpid()}, WORLD_SIZE={ranks}"
    return f"--- {began}: {' '.join(command.splitlines())} ({who})\n"


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _leads_to(file: Path, stream: TextIO) -> bool:
    with suppress(OSError, ValueError):  # no such file yet; a stream that is closed or has no number
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    return False
