"""Read the config.json of a Hugging Face folder: GPT-2's sizes, or why its model is none that ours computes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megagpt.checkpoint.commit import COMMIT, folder
from megagpt.config.mistakes import explain
from megagpt.config.model import ModelConfig
from megagpt.data.manifest import MANIFEST
from megagpt.errors import UserError
from megagpt.git_pointers import pointer_instead_of
from megagpt.terminal import typed

CONFIG = "config.json"
SIZES: dict[
    str, tuple[tuple[str, ...], float | None]
] = {  # our name -> the names it may have there, and transformers' default
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
    "n_head": (("n_head", "num_attention_heads"), 12),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "seq_len": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
    "mlp_width": (("n_inner",), None),
    "norm_eps": (("layer_norm_epsilon",), 1e-5),
}
# Names of one function: GPT-2's GELU, by tanh.
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
FIXED: dict[str, tuple[Any, ...]] = {  # key -> the values that our model has, transformers' default first
    "activation_function": GELU,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "auto_map": (None,),  # a model that is code of its own
}


class GPT2Folder(NamedTuple):
    """Holds what config.json says."""

    model: ModelConfig
    vocab_size: int  # rows of the embeddings
    eos_id: int | None
    tied: bool  # the output head is the embeddings


def read_config(source: Path) -> GPT2Folder:
    """Return the model that a Hugging Face folder holds. Raises UserError for another folder or architecture."""
    config = _parsed(source)
    _check_architecture(source, config)
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise _unlike(source, key, config[key], allowed)
    sizes = {
        name: next((config[key] for key in keys if config.get(key) is not None), default)
        for name, (keys, default) in SIZES.items()
    }
    try:
        model = ModelConfig.model_validate(sizes)
    except ValidationError as error:
        raise UserError(f"{source / CONFIG} has sizes of no model: {explain(error, ModelConfig, section='')}") from None
    if model.mlp_width == 4 * model.n_embd:  # what is not given means
        model = model.model_copy(update={"mlp_width": None})
    rows, eos_id = config.get("vocab_size", 50257), config.get("eos_token_id")
    if type(rows) is not int or rows < 1:
        raise UserError(f"{source / CONFIG}: vocab_size={rows!r:.60} is no number of tokens; fetch the file again")
    tied = config.get("tie_word_embeddings", True) is not False
    return GPT2Folder(model, rows, eos_id if type(eos_id) is int else None, tied)


def _parsed(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    try:
        content = path.read_bytes()
    except OSError:
        raise UserError(_no_folder(source)) from None
    if message := pointer_instead_of(str(path), content):
        raise UserError(message)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not whole JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: its JSON is no object; fetch it again")
    return config


def _no_folder(source: Path) -> str:
    """Return the message for what is no Hugging Face folder."""
    if not source.exists():
        return (
            f"{source} does not exist; give the folder of a model: names of the hub are not downloaded, but "
            "`hf download NAME --local-dir FOLDER` does that"
        )
    if not source.is_dir():
        return f"{source} is a file; give the folder that it is in"
    if (source / COMMIT).is_file() or folder(source).is_dir():
        return f"{source} is megagpt's own and needs no import: give megagpt.init_from={typed(source)}"
    if (source / MANIFEST).is_file():
        return f"{source} is a dataset; give the folder of a model, with its {CONFIG}"
    if (source / "adapter_config.json").is_file():
        return f"{source} is an adapter and no whole model; merge it into its model with peft's merge_and_unload first"
    inner = sorted(path.parent for path in (*source.glob(f"*/{CONFIG}"), *source.glob(f"snapshots/*/{CONFIG}")))
    which = f"did you mean {inner[0]}?" if inner else "give the folder that from_pretrained reads, with its weights"
    return f"{source} has no {CONFIG}; {which}"


def _check_architecture(source: Path, config: dict[str, Any]) -> None:
    kind, names = config.get("model_type"), config.get("architectures")
    if kind is None and {"n_layer", "n_head", "n_embd"} <= config.keys():
        return  # of a transformers older than model_type; another model of that time has other tensors
    if kind != "gpt2":
        named = f" ({', '.join(map(str, names))})" if isinstance(names, list) and names else ""
        raise UserError(
            f"{source} is a model of type {kind!s:.60}{named:.100}, and megagpt imports GPT-2 alone; give a folder "
            f"whose {CONFIG} has model_type gpt2"
        )


def _unlike(source: Path, key: str, value: object, allowed: tuple[Any, ...]) -> UserError:
    ours = " or ".join(json.dumps(one) for one in allowed)
    return UserError(
        f"{source / CONFIG} has {key}={value!r:.100}, and megagpt's GPT-2 computes with {ours} alone, so it would be "
        "another model; give a folder of a GPT-2 with that"
    )
