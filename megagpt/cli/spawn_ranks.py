"""Run modules of megagpt on several ranks of this machine, for commands that must start training afresh."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from uuid import uuid4

import psutil

from megagpt.distributed.rank_variables import without_launcher
from megagpt.errors import UserError

MARK = "MEGAGPT_LAUNCH"  # an environment variable by which the ranks of a launch are found


def on_ranks(n_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` on n_ranks until it ends; SIGTERM or Ctrl-C ends the ranks first."""
    # Without --local-addr the ranks meet at this host's name, which need not resolve: they would wait for minutes.
    here = ["--standalone", "--local-addr=localhost"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *here, f"--nproc-per-node={n_ranks}"]
    command, mark = [*launcher, "-m", module, *arguments], uuid4().hex
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with subprocess.Popen(
            command,
            env=without_launcher(os.environ) | {MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as launched:
            try:
                out, errors = launched.communicate()
            except (SystemExit, KeyboardInterrupt):
                _end(launched, mark)
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(command, launched.returncode, out, errors)


def _end(launched: subprocess.Popen[str], mark: str) -> None:
    """End torchrun by SIGTERM, which it passes on to its ranks, then the ranks that it left.

    It leaves those that it was still starting, and all if it was killed itself.
    """
    launched.terminate()
    launched.wait()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or another user's
            if process.environ().get(MARK) == mark:
                process.kill()
    launched.communicate()  # ends once no rank has the pipes open


def failure_of(done: subprocess.CompletedProcess[str]) -> UserError:
    """Return the error of the rank that reported one, or the end of the output."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return UserError(errors[0].removeprefix("error: ") if errors else f"a rank failed:\n{done.stderr[-3000:]}")
