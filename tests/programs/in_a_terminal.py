"""Train the debug run with the terminal on standard input as the one that controls this process: its end is SIGHUP."""

import fcntl
import sys
import termios
from pathlib import Path

from megagpt.cli.pretrain import pretrain

if __name__ == "__main__":
    fcntl.ioctl(sys.stdin, termios.TIOCSCTTY, 0)
    run_file = Path(__file__).parents[2] / "ds_configs" / "debug_cpu.json"
    sys.exit(pretrain(["--deepspeed_config", str(run_file), *sys.argv[1:]]))
