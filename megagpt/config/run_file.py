"""From a JSON run file and `key.path=value` overrides to a `RunConfig`, or one message that says what is wrong."""

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megagpt.config.deepspeed import DeepSpeedConfig, RunConfig
from megagpt.config.schema import MegaGPTConfig
from megagpt.errors import UserError

SECTION = "megagpt"

# DeepSpeed ignores a misspelt key at the top level, so the keys it reads there are listed here.
# tests/test_run_file.py derives the same list from the installed DeepSpeed.
DEEPSPEED_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "sequence_parallel_size",
        "steps_per_print",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

# Its sections that are plain dictionaries ignore a misspelt key too; the typed ones refuse it themselves.
DEEPSPEED_SECTIONS = {
    "aio": {"block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds"},
    "data_types": {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"},
    "flops_profiler": {
        *("detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor", "top_modules"),
    },
    "timers": {"throughput"},
    "torch_autocast": {"dtype", "enabled", "lower_precision_safe_modules"},
}

# Keys that DeepSpeed reads but that could not act here: refused with the reason instead of ignored.
_DATA_PARALLEL = "megagpt is data and sequence parallel only; remove it"
_OWN_CHECKPOINTS = "megagpt commits checkpoints itself; see megagpt.every.save"
_OWN_DATA = "megagpt brings its own sampler; see megagpt.data"
REFUSED_KEYS = {
    "autotuning": "sizes are chosen by hand; remove it",
    "bfloat16": 'write "bf16"',
    "checkpoint": _OWN_CHECKPOINTS,
    "compile": "blocks are compiled by torch; see megagpt.compile",
    "curriculum_learning": _OWN_DATA,
    "data_efficiency": _OWN_DATA,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "expert_parallel": _DATA_PARALLEL,
    "hybrid_engine": "it is for RLHF; remove it",
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed's default; remove it",
    "pipeline": _DATA_PARALLEL,
    "scheduler": "the learning rate comes from megagpt.schedule",
    "seq_parallel_communication_data_type": "gradients are reduced over all ranks alike; see communication_data_type",
    "tensor_parallel": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": _DATA_PARALLEL,
    "weight_quantization": "it is for inference; remove it",
}


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides, check every key, split off our section. Raises UserError."""
    return parse_run(read_json(path), overrides, where=str(path))


def parse_run(raw: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "run file") -> RunConfig:
    """A RunConfig from the run file's object (which is not changed). Raises UserError."""
    raw = overridden(raw, overrides)
    _check_keys(raw, where)
    section = raw.pop(SECTION)
    try:
        return RunConfig(MegaGPTConfig(**section), DeepSpeedConfig(**raw), raw)
    except ValidationError as error:
        ours = error.title == MegaGPTConfig.__name__
        mistakes = explain(error, MegaGPTConfig if ours else DeepSpeedConfig, section=SECTION if ours else "")
        raise UserError(f"{where}: {mistakes}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The run file's object (which is not changed) with single keys changed. Raises UserError."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        _override(raw, item)
    raw.pop("$schema", None)
    return raw


def run_schema() -> dict[str, Any]:
    """JSON schema of a run file, for completion in editors (`ds_configs/run.schema.json`)."""
    schema = DeepSpeedConfig.model_json_schema()
    section = MegaGPTConfig.model_json_schema()
    schema["$defs"] |= section.pop("$defs")
    schema["title"] = "megagpt run file"
    schema["properties"] = {key: {} for key in sorted(DEEPSPEED_KEYS)} | schema["properties"] | {SECTION: section}
    schema["properties"]["$schema"] = {"type": "string"}
    schema["required"] = [*schema["required"], SECTION]
    schema["additionalProperties"] = False
    return schema


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicate_keys)
    except FileNotFoundError:
        raise UserError(f"run file {path} does not exist; examples are in ds_configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path} is no run file: its brackets are nested too deep") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}; a run file is an object {{...}}")
    return raw


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"the run file gives {', '.join(map(repr, repeated))} twice in one section; keep one")
    return dict(pairs)


def _override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key; a number steps into a list. The value is JSON, or text if it is not."""
    dotted, sep, text = item.partition("=")
    if not sep or not dotted:
        hint = "; a run file goes after --deepspeed_config" if item.endswith(".json") else ""
        raise UserError(f"override {item!r} is not of the form key.path=value{hint}")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicate_keys)
    except (json.JSONDecodeError, RecursionError):
        value = text
    *parents, leaf = dotted.split(".")
    node: Any = raw
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(leaf) if isinstance(node, list) else leaf] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"override {item!r}: there is no {dotted!r} to set") from None


def _check_keys(raw: dict[str, Any], where: str) -> None:
    if refused := [f"{key!r} cannot act here: {why}" for key, why in REFUSED_KEYS.items() if key in raw]:
        raise UserError(f"{where}: " + "; ".join(refused))
    if unknown := sorted(set(raw) - DEEPSPEED_KEYS - {SECTION}):
        hints = "; ".join(f"unknown key {key!r}{did_you_mean(key, DEEPSPEED_KEYS | {SECTION})}" for key in unknown)
        raise UserError(f"{where}: {hints}")
    for name, known in DEEPSPEED_SECTIONS.items():
        for key in sorted(_keys_of(raw, name) - known):
            raise UserError(f"{where}: unknown key {f'{name}.{key}'!r}{did_you_mean(key, known)}")
    if not isinstance(raw.get(SECTION), dict):
        raise UserError(f'{where}: no "{SECTION}" section; see ds_configs/README.md')
    if "api_key" in _keys_of(raw, "comet"):  # the run file is copied into run.json, checkpoints and TensorBoard
        raise UserError(f"{where}: comet.api_key is a secret; set COMET_API_KEY in the environment instead")
    for dotted, value in leaves(raw):
        if value == "auto" and not dotted.startswith(f"{SECTION}.sample."):
            raise UserError(f'{where}: {dotted} is "auto"; write the number, nothing here fills it in')


def _keys_of(raw: dict[str, Any], section: str) -> set[str]:
    found = raw.get(section, {})
    if not isinstance(found, dict):
        raise UserError(f"{section}={found!r} is not a section {{...}}")
    return set(found)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def explain(error: ValidationError, root: type[BaseModel], *, section: str) -> str:
    """Each mistake in a phrase: the dotted key, what is wrong, the value seen or the nearest right key."""
    return "; ".join(phrase for _, phrase in mistakes(error, root, section=section))


def mistakes(error: ValidationError, root: type[BaseModel], *, section: str) -> Iterator[tuple[str, str]]:
    """Each mistake as (dotted key, phrase)."""
    for detail in error.errors():
        dotted = ".".join(map(str, (section, *detail["loc"]) if section else detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = _fields_at(root, detail["loc"][:-1])
            yield dotted, f"unknown key {dotted!r}{did_you_mean(str(detail['loc'][-1]), known)}"
        elif detail["type"] == "missing":
            yield dotted, f"{dotted} is missing"
        elif detail["type"] in ("value_error", "assertion_error"):
            yield dotted, f"{dotted}: {detail['ctx']['error']}"
        elif detail["type"] == "too_short":
            if not detail["input"]:  # else what it holds is wrong, and is named by itself
                yield dotted, f"{dotted} is an empty list"
        elif detail["type"] == "enum":  # which names an alias as one more value
            allowed = ", ".join(dict.fromkeys(detail["ctx"]["expected"].replace(" or ", ", ").split(", ")))
            yield dotted, f"{dotted}={as_written(detail['input'])} is none of {allowed}"
        elif detail["type"] in IS_NOT:
            yield dotted, f"{dotted}={as_written(detail['input'])} is not {IS_NOT[detail['type']]}"
        else:
            yield dotted, f"{dotted}={as_written(detail['input'])}: {detail['msg']}"


IS_NOT = {  # pydantic's own words name Python's types
    "model_type": "a section {...}",
    "tuple_type": "a list [...]",
    "path_type": "a path",
    "string_type": "a text",
}


def as_written(value: Any) -> str:
    """As JSON has it, but texts in quotes as our messages have them."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0]
    return set(model.model_fields)


def did_you_mean(key: str, known: set[str] | frozenset[str]) -> str:
    near = get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
