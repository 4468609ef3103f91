"""The agent that `megagpt tune --hostfile` starts on a host by ssh, for one trial: it runs the trial's command there.

    python -m megagpt.tuning.host_agent LOG COMMAND...

ssh ends nothing on the other side when it is killed, or when a cable is cut. The tuner therefore writes a byte to this
process's standard input at each of its looks; when it ends, or is silent for long, the trial is asked to save and end.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

from megagpt.tuning.trial import end_with_parent

SILENCE = 60.0  # seconds without a byte after which the tuner counts as gone
PATIENCE = 300.0  # seconds that a trial may take to save and end
TICK = 0.2


def main(arguments: list[str]) -> int:
    """Run the command until it ends or the tuner is gone; return its exit code, 128 + N after signal N."""
    log, *command = arguments
    with open(log, "ab") as output:
        trial = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    if not _outlives_tuner(trial):
        _end(trial)
    return trial.returncode if trial.returncode >= 0 else 128 - trial.returncode


def _outlives_tuner(trial: subprocess.Popen[bytes]) -> bool:
    """Wait; return True if the trial ends while the tuner still writes."""
    heard = time.monotonic()
    while trial.poll() is None:
        if select.select([sys.stdin], [], [], TICK)[0]:
            if not os.read(sys.stdin.fileno(), 4096):
                return False
            heard = time.monotonic()
        elif time.monotonic() > heard + SILENCE:
            return False
    return True


def _end(trial: subprocess.Popen[bytes]) -> None:
    """Ask the trial to save and end; kill it if it does not."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(trial.pid, number)
        with suppress(subprocess.TimeoutExpired):
            trial.wait(patience)
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
