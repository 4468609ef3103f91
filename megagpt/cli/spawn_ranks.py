"""Run modules of megagpt on several ranks of this machine, for commands that must start training afresh."""

import os
import signal
import subprocess
import sys

from megagpt.distributed.rank_variables import without_launcher
from megagpt.errors import UserError


def on_ranks(n_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` on n_ranks until it ends; SIGTERM or Ctrl-C ends the ranks first."""
    # Without --local-addr the ranks meet at this host's name, which need not resolve: they would wait for minutes.
    here = ["--standalone", "--local-addr=localhost"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *here, f"--nproc-per-node={n_ranks}"]
    command = [*launcher, "-m", module, *arguments]
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with subprocess.Popen(
            command,
            env=without_launcher(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as launched:
            try:
                out, errors = launched.communicate()
            except (SystemExit, KeyboardInterrupt):
                # SIGTERM, which torchrun passes on to its ranks; SIGKILL would leave them running.
                launched.terminate()
                launched.communicate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(command, launched.returncode, out, errors)


def failure_of(done: subprocess.CompletedProcess[str]) -> UserError:
    """Return the error of the rank that reported one, or the end of the output."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return UserError(errors[0].removeprefix("error: ") if errors else f"a rank failed:\n{done.stderr[-3000:]}")
