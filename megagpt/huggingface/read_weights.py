"""Read GPT-2's tensors from a Hugging Face folder, one file at a time, by the names and shapes of our model.

Folders of all times differ: a prefix `transformer.` or none, masks saved as `attn.bias`, a copy of the tied output
head, one file or several with an index, safetensors or pickles.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.atomic_files import SAFE_NAME
from megagpt.checkpoint.finite import not_finite
from megagpt.config.model import ModelConfig
from megagpt.errors import UserError
from megagpt.git_pointers import MOST_POINTER, pointer_instead_of
from megagpt.huggingface.weights import EMBEDDING, HEAD, TRANSPOSED

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt*")
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers of older versions
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHOWN = 4  # names in a message


def read_weights(source: Path, cfg: ModelConfig, n_rows: int, *, tied: bool, pickles: bool) -> dict[str, Tensor]:
    """Return our model's tensors, in the type they are stored in; the output head only if it is not the embedding.

    `n_rows`: of the embedding of tokens; `tied`: what config.json says of the output head; `pickles` may be read.
    Raises UserError for tensors that are missing, too many, of another shape, or not finite.
    """
    expected, found, surplus = gpt2_shapes(cfg, n_rows), {}, []
    for path in _weight_files(source, pickles):
        for name, tensor in _tensors(path):
            ours = name.removeprefix("transformer.")
            if MASK.fullmatch(ours):
                continue
            if ours not in expected:
                surplus.append(name)
            elif ours in found:
                raise UserError(f"{source} has the tensor {ours} twice, once in {path}; remove one of the files")
            else:
                _check(path, name, tensor, expected[ours])
                found[ours] = tensor.T.contiguous() if ours.endswith(TRANSPOSED) else tensor
    if tied:  # then they may be stored under either name
        found |= {
            name: found[other] for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)) if other in found
        } | found
    missing = [name for name in expected if name not in found]
    if missing or surplus:
        raise UserError(_other_tensors(source, missing, surplus))
    if wrong := not_finite(found):
        raise UserError(
            f"{source} has numbers in {wrong} that are not finite, so its model is of no use; fetch it again"
        )
    if torch.equal(found[HEAD].float(), found[EMBEDDING].float()):
        del found[HEAD]
    elif tied:
        raise UserError(
            f"{source} has {HEAD} and {EMBEDDING} that differ, and config.json says that they are one matrix; write "
            "tie_word_embeddings=false there if the model was trained so, or fetch the folder again"
        )
    return {name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in found.items()}


def gpt2_shapes(cfg: ModelConfig, n_rows: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what GPT2LMHeadModel stores, without the prefix; matrices are (inputs, outputs)."""
    C, inner = cfg.n_embd, cfg.mlp_inner
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (n_rows, C), HEAD: (n_rows, C), "wpe.weight": (cfg.seq_len, C)}
    for i in range(cfg.n_layer):
        for layer, n_in, n_out in (
            *(("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C)),
            *(("mlp.c_fc", C, inner), ("mlp.c_proj", inner, C)),
        ):
            shapes |= {f"h.{i}.{layer}.weight": (n_in, n_out), f"h.{i}.{layer}.bias": (n_out,)}
        shapes |= {f"h.{i}.{norm}.{part}": (C,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def _weight_files(source: Path, pickles: bool) -> list[Path]:
    """Return the files that hold the tensors, safetensors where there are some. Raises UserError."""
    name = next((name for name in (*SAFE, *PICKLED) if (source / name).is_file()), None)
    if name is None:
        there = sorted({path.name for pattern in WEIGHTS for path in source.glob(pattern)})
        has = f", and has {', '.join(there[:SHOWN])}" if there else ""
        raise UserError(
            f"{source} has no {SAFE[0]}, no {SAFE[1]} and no {PICKLED[0]}{has}; save the model with save_pretrained of "
            "transformers"
        )
    if name in PICKLED and not pickles:
        raise UserError(
            f"{source / name} is a pickle, which can hold a program; give --allow-pickle if you trust it (torch then "
            "reads its tensors and nothing else), or save the model as safetensors"
        )
    return [source / name] if not name.endswith(".json") else _indexed(source, name)


def _indexed(source: Path, name: str) -> list[Path]:
    content = _read(source / name)
    try:
        files = sorted(set(json.loads(content)["weight_map"].values()))
        # a plain name: in the hub's cache it is a link to a blob elsewhere
        outside = next((file for file in files if not SAFE_NAME.fullmatch(file)), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source / name} is damaged ({error!r:.100}); fetch it again") from error
    if outside is not None:
        raise UserError(f"{source / name} names the file {outside!r:.100}, which is not in its folder; fetch it again")
    return [source / file for file in files]


def _read(path: Path, size: int = -1) -> bytes:
    """Return a file, or its beginning. Raises UserError if it cannot be read or is a pointer of Git's."""
    try:
        with path.open("rb") as file:
            content = file.read(size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; fetch the folder again, whole") from error
    if message := pointer_instead_of(str(path), content):
        raise UserError(message)
    return content


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a file by its name."""
    _read(path, MOST_POINTER)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    yield name, file.get_tensor(name)
            return
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from error
    except Exception as error:  # of many kinds: a pickle is a program
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged, or holds more than tensors ({why:.200}); fetch it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{path} holds no tensors by their names; give a file that save_pretrained wrote")
    yield from loaded.items()


def _check(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, and by config.json it has {shape}; restore the "
            "config.json that belongs to these weights"
        )
    if tensor.dtype not in NUMBERS:
        raise UserError(f"{path}: {name} has numbers of type {tensor.dtype}; give the model before it was quantized")


def _other_tensors(source: Path, missing: list[str], surplus: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(surplus)}, which GPT-2 has not"] * bool(surplus)
    return (
        f"{source} is another model than its config.json says: it {' and '.join(parts)}; fetch the folder again, whole"
    )
