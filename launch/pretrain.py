"""Train: the program that `deepspeed`, `torchrun`, `srun` or plain `python` starts once per rank."""

import sys
from pathlib import Path

# A checkout on a shared disk works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megagpt.cli.pretrain import main

if __name__ == "__main__":
    main()
