"""Read the config.json of a Hugging Face folder: the model's sizes and choices, or why ours computes no such model."""

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
from megagpt.huggingface.weights import ARCHITECTURES, CLASSES
from megagpt.terminal import typed

CONFIG = "config.json"
# model_type -> our name -> the names that it may have there, and transformers' default
SIZES: dict[str, dict[str, tuple[tuple[str, ...], float | None]]] = {
    "gpt2": {
        "n_layer": (("n_layer", "num_hidden_layers"), 12),
        "n_head": (("n_head", "num_attention_heads"), 12),
        "n_embd": (("n_embd", "hidden_size"), 768),
        "seq_len": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
        "mlp_width": (("n_inner",), None),
        "norm_eps": (("layer_norm_epsilon",), 1e-5),
    },
    "llama": {
        "n_layer": (("num_hidden_layers",), 32),
        "n_head": (("num_attention_heads",), 32),
        "n_kv_head": (("num_key_value_heads",), None),
        "n_embd": (("hidden_size",), 4096),
        "seq_len": (("max_position_embeddings",), 2048),
        "mlp_width": (("intermediate_size",), 11008),
        "norm_eps": (("rms_norm_eps",), 1e-6),
    },
}
SIZES["qwen3"] = SIZES["llama"] | {
    "seq_len": (("max_position_embeddings",), 32768),
    "mlp_width": (("intermediate_size",), 22016),
}
VOCAB_SIZES = {"gpt2": 50257, "llama": 32000, "qwen3": 151936}  # transformers' defaults
# Names of one function: GPT-2's GELU, by tanh.
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
OF_ALL: dict[str, tuple[Any, ...]] = {  # key -> the values that our model has, transformers' default first
    "is_causal": (True,),
    "quantization_config": (None,),
    "auto_map": (None,),  # a model that is code of its own
}
OF_LLAMA = OF_ALL | {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": OF_ALL
    | {
        "activation_function": GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": OF_LLAMA,
    "qwen3": OF_LLAMA | {"use_sliding_window": (False,)},
}
HEAD_DIMS = {"llama": None, "qwen3": 128}  # transformers' defaults


class Config(NamedTuple):
    """Holds what config.json says."""

    model: ModelConfig
    vocab_size: int  # rows of the embeddings
    bos_id: int | None
    eos_id: int | None
    tied: bool  # the output head is the embeddings


def read_config(source: Path) -> Config:
    """Return the model that a Hugging Face folder holds. Raises UserError for another folder or architecture."""
    config = _parsed(source)
    kind = _model_type(source, config)
    for key, allowed in FIXED[kind].items():
        if config.get(key, allowed[0]) not in allowed:
            raise _unlike(source, kind, key, config[key], allowed)
    choices = CLASSES[ARCHITECTURES[kind].causal_lm] | {
        name: next((config[key] for key in keys if config.get(key) is not None), default)
        for name, (keys, default) in SIZES[kind].items()
    }
    if kind != "gpt2":
        choices |= _rotary(source, kind, config)
    try:
        model = ModelConfig.model_validate(choices)
    except ValidationError as error:
        raise UserError(f"{source / CONFIG} has sizes of no model: {explain(error, ModelConfig, section='')}") from None
    if kind != "gpt2":
        _check_attention(source, kind, config, model)
    rows = config.get("vocab_size", VOCAB_SIZES[kind])
    if type(rows) is not int or rows < 1:
        raise UserError(f"{source / CONFIG}: vocab_size={rows!r:.60} is no number of tokens; fetch the file again")
    ends = (config.get(key) for key in ("bos_token_id", "eos_token_id"))
    bos_id, eos_id = (end if type(end) is int and end >= 0 else None for end in ends)
    tied = config.get("tie_word_embeddings", kind == "gpt2") is not False
    return Config(model, rows, bos_id, eos_id, tied)


def _rotary(source: Path, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the base and scaling of rotary positions. Raises UserError for scaling that our model has not.

    transformers 4 writes rope_theta and rope_scaling, and 5 rope_parameters, which holds both.
    """
    keys = ("rope_theta", "rope_scaling", "rope_parameters")
    given = {key: config[key] for key in keys if config.get(key) is not None}
    bases, factors = [given.get("rope_theta")], []
    for key in [key for key in given if key != "rope_theta"]:
        factors.append(_scaling(source, kind, key, given[key]))
        bases.append(given[key].get("rope_theta"))
    bases, factors = [base for base in bases if base is not None] or [10_000.0], factors or [1.0]
    if any(base != bases[0] for base in bases) or any(factor != factors[0] for factor in factors):
        named = ", ".join(f"{key}={value!r:.100}" for key, value in given.items())
        raise UserError(
            f"{source / CONFIG} contradicts itself: {named}, of which versions of transformers read one or the other; "
            "keep those that the model was trained with"
        )
    return {"rotary_base": bases[0], "rotary_scaling": factors[0]}


def _scaling(source: Path, kind: str, key: str, parameters: Any) -> Any:
    """Return what positions are divided by. Raises UserError for another kind of scaling than linear."""
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise _unlike(source, kind, key, parameters, ({"rope_type": "default"},))
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise _unlike(source, kind, f"{key}.rope_type", rope_type, ("default", "linear"))
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise _unlike(source, kind, f"{key}.partial_rotary_factor", parameters["partial_rotary_factor"], (1.0,))
    return parameters.get("factor") if rope_type == "linear" else 1.0


def _check_attention(source: Path, kind: str, config: dict[str, Any], model: ModelConfig) -> None:
    """Raise UserError for heads of another width than ours, and for layers that do not attend to the whole text."""
    width = config.get("head_dim", HEAD_DIMS[kind])
    if width not in (None, model.head_dim):
        raise _unlike(source, kind, "head_dim", width, (model.head_dim,))
    layers = config.get("layer_types")
    others = [layer for layer in layers if layer != "full_attention"] if isinstance(layers, list) else layers
    if others:
        raise _unlike(source, kind, "layer_types", others, ("full_attention",))


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


def _model_type(source: Path, config: dict[str, Any]) -> str:
    """Return gpt2, llama or qwen3. Raises UserError for another architecture."""
    kind, names = config.get("model_type"), config.get("architectures")
    if kind is None and {"n_layer", "n_head", "n_embd"} <= config.keys():
        return "gpt2"  # of a transformers older than model_type; another model of that time has other tensors
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        named = f" ({', '.join(map(str, names))})" if isinstance(names, list) and names else ""
        raise UserError(
            f"{source} is a model of type {kind!s:.60}{named:.100}, and megagpt imports GPT-2, Llama and Qwen3 alone; "
            f"give a folder whose {CONFIG} has model_type gpt2, llama or qwen3"
        )
    return kind


def _unlike(source: Path, kind: str, key: str, value: object, allowed: tuple[Any, ...]) -> UserError:
    ours, title = " or ".join(json.dumps(one) for one in allowed), ARCHITECTURES[kind].title
    return UserError(
        f"{source / CONFIG} has {key}={value!r:.100}, and megagpt's {title} computes with {ours} alone, so it would be "
        f"another model; give a folder of a {title} with that"
    )
