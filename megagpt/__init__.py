"""megagpt: a small, typed, tested GPT-2 pretrainer on DeepSpeed."""

import os

# torch's allocators read these when they are first used
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # CPU: large pages, else every step faults in gigabytes by 4 KiB
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # CUDA: no holes when sizes change

__version__ = "0.1.0"
