"""Explain an error that DeepSpeed raises after it has checked the run file: what failed, and the keys to suspect."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType

import torch.distributed as dist

from megagpt.config.parsing import leaves
from megagpt.config.run_file import RunConfig
from megagpt.errors import OwnRankError, UserError
from megagpt.guards.out_of_memory import is_out_of_memory

# Keys that every run file may have, and that no error of DeepSpeed's is due to.
USUAL = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization.stage", "optimizer.*", "bf16.enabled", "tensorboard.*"),
)
# Messages of RuntimeErrors that come from another rank, the network or the device, not from the run file.
FROM_OUTSIDE = ("gloo", "nccl", "cuda", "cublas", "connection", "timed out", "timeout", "store")


@contextmanager
def deepspeed_explained(run: RunConfig) -> Iterator[None]:
    """Turn an error of any type that DeepSpeed raises into an OwnRankError.

    Not a lost rank, a lost device, a full disk, or memory that ran out: those are not due to the run file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_deepspeeds(error.__traceback__) or _is_from_outside(error):
            raise
        unusual = [key for key in leaves(run.deepspeed_raw) if not any(fnmatchcase(key, usual) for usual in USUAL)]
        place = traceback.extract_tb(error.__traceback__)[-1]
        keys = f"remove the one that it cannot do: {', '.join(unusual)}" if unusual else "the run file has none"
        raise OwnRankError(
            f"DeepSpeed failed with {type(error).__name__}: {str(error)[:500]} (in {place.filename}, line "
            f"{place.lineno}). Keys beyond the usual ones are the likeliest reason; {keys}"
        ) from error


def _is_deepspeeds(trace: TracebackType | None) -> bool:
    """Tell whether DeepSpeed's own code raised an error, or torch or the standard library when that called them.

    Not what DeepSpeed calls of ours, the forward pass: a mistake there needs its traceback.
    """
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(trace)]
    callers = [name for name in packages if name != "torch" and name not in sys.stdlib_module_names]
    return callers[-1:] == ["deepspeed"]


def _is_from_outside(error: Exception) -> bool:
    if is_out_of_memory(error) or isinstance(error, OSError | dist.DistError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    return is_plain and any(text in str(error).lower() for text in FROM_OUTSIDE)
