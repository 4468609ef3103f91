"""Two groups of two ranks: samples are shared out over the groups, positions within them."""

import sys
from pathlib import Path

from support import SHARING, debug_run

from megagpt.distributed.process_group import init_process_group, leave
from megagpt.train.trainer import train

if __name__ == "__main__":
    device = init_process_group()
    dataset, out_dir = map(Path, sys.argv[1:])
    train(debug_run(dataset, out_dir, "sequence_parallel_size=2", *SHARING["stage1"]), device)
    leave()
