"""Read the tensors of a Hugging Face folder, one file at a time, as the tensors of our model.

Folders of all times differ: a prefix (`transformer.` or `model.`) or none, buffers such as masks, a copy of the tied
output head, one file or several with an index, safetensors or pickles.
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
from megagpt.huggingface.weights import ARCHITECTURES, EMBEDDING, HEAD, is_transposed, model_type, stored_rows
from megagpt.model.gpt import GPT

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt*")
# Buffers of older versions: masks, and the frequencies of rotary positions.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHOWN = 4  # names in a message


def read_weights(source: Path, cfg: ModelConfig, n_rows: int, *, tied: bool, pickles: bool) -> dict[str, Tensor]:
    """Return our model's tensors, in the type they are stored in; the output head only if it is not the embedding.

    `n_rows`: of the embedding of tokens; `tied`: what config.json says of the output head; `pickles` may be read.
    Raises UserError for tensors that are missing, too many, of another shape, or not finite.
    """
    architecture, layout = ARCHITECTURES[model_type(cfg)], stored_shapes(cfg, n_rows)
    expected = {name: shape for parts in layout.values() for name, shape in parts.items()}
    found: dict[str, Tensor] = {}
    surplus = []
    for path in _weight_files(source, pickles):
        for stored, tensor in _tensors(path):
            name = stored.removeprefix(architecture.prefix)
            if BUFFER.fullmatch(name):
                continue
            if name not in expected:
                surplus.append(stored)
            elif name in found:
                raise UserError(f"{source} has the tensor {name} twice, once in {path}; remove one of the files")
            else:
                _check(path, stored, tensor, expected[name])
                found[name] = tensor
    embedding, head = (next(iter(layout[name])) for name in (EMBEDDING, HEAD))
    if tied:  # then they may be stored under either name
        found |= {
            name: found[other] for name, other in ((head, embedding), (embedding, head)) if other in found
        } | found
    missing = [name for name in expected if name not in found]
    if missing or surplus:
        raise UserError(_other_tensors(source, missing, surplus, architecture.title))
    if wrong := not_finite(found):
        raise UserError(
            f"{source} has numbers in {wrong} that are not finite, so its model is of no use; fetch it again"
        )
    if torch.equal(found[head].float(), found[embedding].float()):
        del layout[HEAD]
    elif tied:
        raise UserError(
            f"{source} has {head} and {embedding} that differ, and config.json says that they are one matrix; write "
            "tie_word_embeddings=false there if the model was trained so, or fetch the folder again"
        )
    return {name: _joined(name, [found.pop(part) for part in parts], cfg) for name, parts in layout.items()}


def stored_shapes(cfg: ModelConfig, n_rows: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each tensor of our model, the names (without the prefix) and shapes of those that it is stored in."""
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in GPT(cfg, n_rows).state_dict().items()}
    prefix = ARCHITECTURES[model_type(cfg)].prefix
    return {
        name: {
            theirs.removeprefix(prefix): (rows, *shape[1:])[:: -1 if is_transposed(name, cfg) else 1]
            for theirs, rows in stored_rows(name, cfg, shape[0]).items()
        }
        for name, shape in ours.items()
    }


def _joined(name: str, parts: list[Tensor], cfg: ModelConfig) -> Tensor:
    """Return our tensor, from the tensors that hold its rows."""
    parts = [part.T.contiguous() if is_transposed(name, cfg) else part for part in parts]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.float() if whole.dtype == torch.float64 else whole


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


def _other_tensors(source: Path, missing: list[str], surplus: list[str], title: str) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(surplus)}, which {title} has not"] * bool(surplus)
    return (
        f"{source} is another model than its config.json says: it {' and '.join(parts)}; fetch the folder again, whole"
    )
