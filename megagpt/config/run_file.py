"""Load a run file: from JSON and `key.path=value` overrides to a `RunConfig`, or one message that names the mistake."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.deepspeed_keys import (
    DEEPSPEED_DEFAULTS,
    DEEPSPEED_KEYS,
    DEEPSPEED_PATHS,
    DEEPSPEED_SECTIONS,
    DESCRIPTIONS,
    REFUSED_KEYS,
)
from megagpt.config.doubling import check_doubles
from megagpt.config.extends import EXTENDS, merged, named, read_run_files
from megagpt.config.length import with_steps
from megagpt.config.mistakes import explain, no_section, only_key, unknown_key
from megagpt.config.parsing import dotted_items, leaves, overridden
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import typed_keys
from megagpt.errors import UserError
from megagpt.user_paths import local_path

SECTION = "megagpt"
# Every key of a run file, except those that only DeepSpeed's own models know.
KEYS = (
    typed_keys(MegaGPTConfig, SECTION)
    | typed_keys(DeepSpeedConfig)
    | {key for key, _ in dotted_items(DEEPSPEED_DEFAULTS)}
)
# Those of DeepSpeed's whose defaults decide on the training of every run.
ACTING = (
    *("gradient_clipping", "zero_optimization.stage", "bf16.enabled", "fp16.enabled", "optimizer.type"),
    *("optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
)
# Those that decide how many steps are max_tokens or max_epochs.
DECIDE_ON_STEPS = ("train_batch_size", *(f"{SECTION}.{key}" for key in ("schedule", "data", "model", "packing")))
# Those of DeepSpeed's that have no default.
REQUIRED = ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer.params.lr")


@dataclass(frozen=True)
class RunConfig:
    """A parsed run file: the "megagpt" section, a typed view of DeepSpeed's keys, and those keys exactly as written.

    Raises ValueError if the first two do not fit together.
    """

    megagpt: MegaGPTConfig
    deepspeed: DeepSpeedConfig
    deepspeed_raw: dict[str, Any]

    def __post_init__(self) -> None:
        cfg, P = self.megagpt, self.deepspeed.sequence_parallel_size
        shared = {
            "megagpt.model.n_head": cfg.model.n_head,
            "megagpt.model.seq_len": cfg.model.seq_len,
            "megagpt.data.seq_len": cfg.seq_len,
        }
        if P > 1 and cfg.model.position == "alibi":
            raise ValueError(
                f"sequence_parallel_size={P} divides heads over ranks, and the biases of megagpt.model.position=alibi "
                "are not divided; set megagpt.model.position to rotary, or sequence_parallel_size to 1"
            )
        if P > 1 and (n := cfg.schedule.seq_len_warmup_steps):
            raise ValueError(
                f"sequence_parallel_size={P} divides each row over ranks, and with megagpt.schedule."
                f"seq_len_warmup_steps={n} rows are read in shorter pieces; remove the latter and "
                "megagpt.schedule.first_seq_len, or set sequence_parallel_size to 1"
            )
        check_doubles(
            ("megagpt.schedule.first_batch", cfg.schedule.first_batch),
            ("train_batch_size", self.deepspeed.train_batch_size),
            "megagpt.schedule.batch_ramp_steps",
        )
        common = math.gcd(*shared.values())
        for name, n in shared.items():
            if n % P:
                raise ValueError(
                    f"sequence_parallel_size={P} does not divide {name}={n}, but {P} ranks share heads and "
                    "positions evenly; set sequence_parallel_size to "
                    f"{max(p for p in range(1, P) if common % p == 0)}, or change {name}"
                )

    def tokens(self, steps: int) -> int:
        """Return how many tokens the first `steps` steps train on."""
        return self.megagpt.schedule.batches(self.deepspeed.train_batch_size).total(steps) * self.megagpt.seq_len

    def as_json(self) -> dict[str, Any]:
        """Return the run file again, with our section's defaults written out."""
        return {**self.deepspeed_raw, SECTION: self.megagpt.model_dump(mode="json")}

    def given(self) -> dict[str, Any]:
        """Return the values that the run file gives, by their dotted keys: without the steps that its data tells."""
        found = leaves(self.as_json())
        if self.megagpt.schedule.max_epochs is not None:
            del found[f"{SECTION}.schedule.max_steps"]
        return found

    def written_out(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the run file `plain` with the defaults in ACTING written out where it leaves them out."""
        plain = json.loads(json.dumps(plain))
        typed = self.deepspeed.model_dump(mode="json")
        for dotted in ACTING:
            *sections, key = dotted.split(".")
            node, values = plain, typed
            for name in sections:
                node, values = node.setdefault(name, {}), values[name]
            node.setdefault(key, values[key])
        return plain

    def changed(self, *overrides: str) -> "RunConfig":
        """Return the run with single keys changed, each written `key.path=value` as on a command line.

        Raises UserError.
        """
        plain = self.as_json()
        counted = self.megagpt.schedule.length[0] != "megagpt.schedule.max_steps"
        if counted and any(override.startswith(DECIDE_ON_STEPS) for override in overrides):
            del plain[SECTION]["schedule"]["max_steps"]  # else kept: the data that tells it may be elsewhere
        return parse_run(plain, overrides)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides, check every key and split off our section. Raises UserError."""
    files = read_run_files(path)
    return parse_run(merged(files), overrides, where=named(files))


def parse_run(raw: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "run file") -> RunConfig:
    """Make a RunConfig of a run file's object, which is not changed; `where` begins messages. Raises UserError."""
    raw = overridden(raw, overrides)
    _check_keys(raw, where)
    _expand_paths(raw, where)
    ours = raw.pop(SECTION)
    try:
        ours = with_steps(ours, raw)
        return RunConfig(MegaGPTConfig(**ours), DeepSpeedConfig(**raw), raw)
    except ValidationError as error:
        of_ours = error.title == MegaGPTConfig.__name__
        model, section = (MegaGPTConfig, SECTION) if of_ours else (DeepSpeedConfig, "")
        mistakes = explain(error, model, section=section, elsewhere=KEYS)
        raise UserError(f"{where}: {mistakes}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file, for completion in editors (`ds_configs/run.schema.json`)."""
    schema = DeepSpeedConfig.model_json_schema()
    section = MegaGPTConfig.model_json_schema()
    schema["$defs"] |= section.pop("$defs")
    schema["title"] = "megagpt run file"
    untyped = {key: {"description": DESCRIPTIONS[key]} for key in sorted(DESCRIPTIONS)}
    schema["properties"] = untyped | schema["properties"] | {SECTION: section}
    schema["properties"]["$schema"] = {"type": "string", "description": "this schema's file, for editors"}
    schema["properties"][EXTENDS] = {
        "type": "string",
        "description": "another run file, relative to this one's folder, whose keys this one changes; null removes one",
    }
    schema["required"] = [*schema["required"], SECTION]
    schema["additionalProperties"] = False
    for model in (schema, section, *schema["$defs"].values()):
        for value in model["properties"].values():
            if "$ref" in value:  # a section, described by its model's docstring
                value.setdefault("description", schema["$defs"][value["$ref"].rpartition("/")[2]]["description"])
    return schema


def _check_keys(raw: dict[str, Any], where: str) -> None:
    """Raise UserError for the top-level mistakes that no model reports; DeepSpeed would ignore most of them."""
    if EXTENDS in raw:
        raise UserError(f"{where}: {EXTENDS} acts in a file alone; write it into one, not on the command line")
    if refused := [f"{key!r} is not supported: {why}" for key, why in REFUSED_KEYS.items() if key in raw]:
        raise UserError(f"{where}: " + "; ".join(refused))
    if unknown := sorted(set(raw) - DEEPSPEED_KEYS - {SECTION}):
        hints = "; ".join(unknown_key(only_key(key, raw[key]), DEEPSPEED_KEYS | {SECTION}, KEYS) for key in unknown)
        raise UserError(f"{where}: {hints}")
    for name, known in DEEPSPEED_SECTIONS.items():
        for key in sorted(_keys_of(raw, name, known) - known):
            raise UserError(f"{where}: {unknown_key(f'{name}.{key}', known, KEYS)}")
    if not isinstance(raw.get(SECTION), dict):
        raise UserError(f"{where}: {no_own_section(raw)}")
    # The run file is copied into run.json, checkpoints and TensorBoard.
    for section in ("comet", "wandb"):
        if "api_key" in _keys_of(raw, section, ("enabled",)):
            variable = f"{section.upper()}_API_KEY"
            raise UserError(f"{where}: {section}.api_key is a secret; set {variable} in the environment instead")
    if found := "; ".join(auto_values(raw).values()):
        raise UserError(f"{where}: {found}")


def no_own_section(raw: dict[str, Any]) -> str:
    """Return a message about a run file without our section, as one that was written for DeepSpeed alone."""
    if SECTION in raw:
        return no_section(SECTION, raw[SECTION], ())
    return f'no "{SECTION}" section; `megagpt init DATA` writes a run file, and ds_configs/README.md lists its keys'


def auto_values(raw: dict[str, Any]) -> dict[str, str]:
    """Return a message for each key with the value "auto", which Hugging Face's Trainer fills in."""
    return {
        dotted: f'{dotted} is "auto"; write {_kind(dotted)}, because megagpt does not fill it in'
        + ("" if dotted in REQUIRED else ", or remove the key for its default")
        for dotted, value in leaves(raw).items()
        if value == "auto" and dotted.split(".")[0] not in REFUSED_KEYS and not dotted.startswith(f"{SECTION}.sample.")
    }


def _kind(dotted: str) -> str:
    return "true or false" if dotted.endswith(".enabled") else "the number"


def _expand_paths(raw: dict[str, Any], where: str) -> None:
    """Expand `~` and variables in DeepSpeed's paths, in place: DeepSpeed would make folders of those names."""
    for dotted in DEEPSPEED_PATHS:
        *sections, key = dotted.split(".")
        node: Any = raw
        for name in sections:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(key), str):
            try:
                node[key] = local_path(node[key])
            except UserError as error:
                raise UserError(f"{where}: {dotted}: {error}") from None


def _keys_of(raw: dict[str, Any], section: str, known: Collection[str]) -> set[str]:
    found = raw.get(section, {})
    if not isinstance(found, dict):
        raise UserError(no_section(section, found, known))
    return set(found)
