"""Our own programs on several ranks of this machine, each launch as after a real start."""

import os
import signal
import subprocess
import sys

from megagpt.errors import UserError

LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what would make them think otherwise


def on_ranks(n_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` on so many ranks, to its end; SIGTERM or Ctrl-C here ends them first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED_BY}
    command = [*launcher, "-m", module, *arguments]
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as launched:
            try:
                out, errors = launched.communicate()
            except (SystemExit, KeyboardInterrupt):
                launched.terminate()  # not a kill: torchrun passes it on
                launched.communicate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(command, launched.returncode, out, errors)


def failure_of(done: subprocess.CompletedProcess[str]) -> UserError:
    """With the message of the rank that had one."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return UserError(errors[0].removeprefix("error: ") if errors else f"a rank failed:\n{done.stderr[-3000:]}")
