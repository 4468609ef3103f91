"""megagpt: a small, typed, tested GPT-2 pretrainer on DeepSpeed."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megagpt.language_model import LanguageModel

# torch's allocators read these when they are first used
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # CPU: large pages, else every step faults in gigabytes by 4 KiB
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # CUDA: no holes when sizes change

__version__ = "0.1.0"


def load(
    run: "str | os.PathLike[str]",
    *,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype" = "fp32",
    ema: bool = False,
) -> "LanguageModel":
    """Load the model of a run's folder (its best step), of one step's, or of the pointers `best` and `latest`.

    `device`: the GPU if there is one, else the CPU, or what torch calls a device. `dtype`: fp32, bf16 or fp16. `ema`:
    with the averaged weights of a run with megagpt.ema.decay.
    Raises megagpt.errors.UserError, a ValueError, for whatever cannot be loaded; the run may train meanwhile.
    """
    from megagpt import language_model  # here, so that `import megagpt` does not wait for torch and DeepSpeed

    return language_model.load(run, device=device, dtype=dtype, ema=ema)
