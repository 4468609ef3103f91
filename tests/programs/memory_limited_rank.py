"""pretrain in a process whose last rank may take two GiB of addresses more than it has when it begins."""

import os
import resource
import sys
from pathlib import Path

import megagpt.train.trainer  # noqa: F401  # so that what libraries map is not counted
from megagpt.cli.pretrain import pretrain

if __name__ == "__main__":
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 2 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(pretrain(sys.argv[1:]))
