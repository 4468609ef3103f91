"""Load checkpoint files safely: a pickle is a program, so each is read as data before anything may run it."""

import pickletools
from pathlib import Path
from typing import Any

import torch

from megagpt.errors import UserError

ALLOWED = frozenset(
    [
        "collections OrderedDict",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
        "torch Size",
        "torch Tensor",
        "torch bfloat16",  # a loss scaler holds its dtype
        "torch float16",
        "torch float32",
        "torch._tensor _rebuild_from_type_v2",  # calls only what else stands here
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {name}Storage" for name in ("BFloat16", "Bool", "Byte", "Double", "Float", "Half", "Int", "Long")),
    ]
)
SAVED_BY_OTHERS = "if you trust it, save it with this megagpt; else delete the step's folder"


def pickles_of(step_dir: Path) -> list[Path]:
    """Return all files that DeepSpeed might read: it finds shards by pattern, so files without a manifest count too."""
    return sorted(step_dir.rglob("*.pt"))


def check_pickles(paths: list[Path]) -> None:
    """Refuse files that torch.load(weights_only=False) would let call anything but what our checkpoints need.

    Raises UserError naming the file and the global. The pickle is taken from the archive by the reader that torch.load
    itself uses, so both see the same bytes; nothing in it is executed.
    """
    for path in paths:
        try:
            reader = torch._C.PyTorchFileReader(str(path))
            records = set(reader.get_all_records())
            program = reader.get_record("data.pkl")
            found = _globals(program)
        except (RuntimeError, ValueError, UnicodeDecodeError) as error:  # also raised for torch's older format
            raise UserError(
                f"checkpoint file {path} was not written by this torch ({error}); delete its step's folder to resume "
                "from the step before"
            ) from error
        if "constants.pkl" in records:
            raise UserError(f"checkpoint file {path} is a TorchScript program, not a checkpoint; {SAVED_BY_OTHERS}")
        if foreign := sorted(found - ALLOWED):
            raise UserError(
                f"{path} would call {foreign[0].replace(' ', '.')} when it is loaded, which no checkpoint of megagpt "
                f"needs: it may run any program; nothing of it was run. {SAVED_BY_OTHERS.capitalize()}"
            )


def load_checked(path: Path, *, mmap: bool = False) -> Any:
    """Load a file onto the CPU. With `mmap`, its tensors are read from disk only when they are used.

    Raises UserError as `check_pickles` does.
    """
    check_pickles([path])
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False)


def _globals(program: bytes) -> set[str]:
    """Return every "module name" that a pickle imports. torch.save writes protocol 2, which has one opcode for it."""
    found = set()
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL":
            found.add(str(argument))
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):  # other ways to import
            found.add(f"{opcode.name} {argument or ''}")
    return found
