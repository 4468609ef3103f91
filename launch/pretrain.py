"""Train: the program that `deepspeed`, `torchrun`, `srun` or plain `python` starts, once per rank."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout on a shared disk needs no install

from megagpt.__main__ import pretrain
from megagpt.train.preemption import SIGNALS

if __name__ == "__main__":
    code = pretrain()
    for number in (*SIGNALS, signal.SIGINT):  # the first rank to end makes launchers signal the others
        signal.signal(number, signal.SIG_IGN)  # whose code must stand
    from megagpt.distributed.process_group import leave  # torch, which came after signals were remembered

    leave()
    sys.exit(code)
