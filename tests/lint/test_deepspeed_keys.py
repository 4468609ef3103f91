"""The keys of DeepSpeed that lint knows, against the source of the installed DeepSpeed and its documentation."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed_source import Known, Place, known_to
from pydantic import BaseModel
from support import GOOD

from megagpt.config.deepspeed_keys import DEEPSPEED_DEFAULTS, REFUSED_KEYS
from megagpt.engine.deepspeed_config import KEPT_FROM_DEEPSPEED
from megagpt.engine.deepspeed_models import REMOVED_KEYS, SECTION_MODELS
from megagpt.lint.deepspeed_sections import deepspeed_sections
from megagpt.lint.linter import lint_file

# Read where ZeRO is switched on by a bare `true`, which megagpt does not accept.
BESIDE_A_BOOLEAN_ZERO = {"allgather_size"}


@pytest.fixture(scope="module")
def known() -> Known:
    from deepspeed.runtime.config import DeepSpeedConfig

    return known_to(DeepSpeedConfig)


def corrections(found: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    """One line for each key whose entry in DEEPSPEED_DEFAULTS is missing, too much, or has another default."""
    for key in sorted(found.keys() | listed.keys()):
        if key not in listed:
            yield f'add "{key}": {found[key]!r}, to DEEPSPEED_DEFAULTS or a reason to REFUSED_KEYS'
        elif key not in found:
            yield f'remove "{key}" from DEEPSPEED_DEFAULTS'
        elif isinstance(found[key], dict) and isinstance(listed[key], dict):
            yield from (f"{key}: {line}" for line in corrections(found[key], listed[key]))
        elif found[key] != listed[key]:
            yield f'write "{key}": {found[key]!r}, in DEEPSPEED_DEFAULTS, which has {listed[key]!r}'


def as_listed(known: Known, place: Place = ()) -> dict[str, Any]:
    """What DEEPSPEED_DEFAULTS should hold, by DeepSpeed's source."""
    keys = known.keys[place] - set(REMOVED_KEYS)
    if not place:
        keys = keys - set(REFUSED_KEYS) - BESIDE_A_BOOLEAN_ZERO
    untyped = {
        key for key in keys if (*place, key) in known.keys and (*place, key) not in known.classes and not kept(key)
    }
    return {
        key: as_listed(known, (*place, key)) if key in untyped else known.default(place, key) for key in sorted(keys)
    }


def kept(key: str) -> bool:
    """Whether megagpt checks the section with a model of its own."""
    return key in KEPT_FROM_DEEPSPEED


def test_the_listed_keys_are_those_that_the_installed_deepspeed_reads(known):
    assert list(corrections(as_listed(known), DEEPSPEED_DEFAULTS)) == []


def test_a_key_that_the_list_lacks_has_too_much_or_gives_another_default_is_named():
    found, listed = {"new": 1, "same": None, "section": {"inner": 2}}, {"old": 1, "same": None, "section": {"inner": 3}}
    assert [line.split(",")[0] for line in corrections(found, listed)] == [
        'add "new": 1',
        'remove "old" from DEEPSPEED_DEFAULTS',
        'section: write "inner": 2',
    ]


def test_the_refused_keys_are_read_or_removed_by_the_installed_deepspeed(known):
    assert set(REFUSED_KEYS) - known.keys[()] - set(REMOVED_KEYS) == set()
    assert known.removed == REMOVED_KEYS


def test_the_models_of_typed_sections_are_deepspeeds(known):
    """Also of those inside other sections, with the same keys."""
    ours = {name: section for name, section in deepspeed_sections().items() if section.model is not None}
    places = [place for place in known.classes if place[0] not in REFUSED_KEYS and not kept(place[0])]
    assert {".".join(place): known.classes[place] for place in places} == {n: s.model for n, s in ours.items()}
    assert {".".join(place): known.keys[place] for place in places} == {n: set(s.defaults) for n, s in ours.items()}
    assert set(SECTION_MODELS) <= set(ours)


def classes_of_training() -> set[type[BaseModel]]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    parts = ("runtime", "monitor", "comm", "compile", "utils")
    found = {cls for cls in DeepSpeedConfigModel.__subclasses__() if cls.__module__.split(".")[1] in parts}
    return {
        cls for cls in found if cls.__module__.startswith("deepspeed.") and cls.__name__ != "DeepSpeedMonitorConfig"
    }


def test_every_config_class_of_deepspeeds_training_is_found(known):
    assert classes_of_training() - set(known.classes.values()) == set()


def complaints_about(section: dict[str, Any], tmp_path) -> list[str]:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(GOOD | section))
    return [finding.text for finding in lint_file(path) if "unknown key" in finding.text]


def test_no_key_of_deepspeeds_config_classes_is_unknown(known, tmp_path):
    """Each field under both of its names; what a section holds is checked in its own place."""
    complaints = []
    for place, model in known.classes.items():
        section = {name: None for field, info in model.model_fields.items() for name in {field, info.alias or field}}
        for key in reversed(place):
            section = {key: section}
        complaints += complaints_about(section, tmp_path)
    assert complaints == []
    assert len(known.classes) >= 15


# What DeepSpeed's page on its configuration documents, written down by hand, section by section.
DOCUMENTED = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "optimizer scheduler communication_data_type prescale_gradients gradient_predivide_factor gradient_clipping "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state "
    "sequence_parallel_size seq_parallel_communication_data_type memory_breakdown disable_allgather "
    "sparse_gradients sparse_attention elasticity amp progressive_layer_drop eigenvalue curriculum_learning "
    "autotuning checkpoint data_efficiency compression_training hybrid_engine tensor_parallel compile pipeline",
    "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
    "zero_optimization": "stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter "
    "reduce_bucket_size contiguous_gradients round_robin_gradients sub_group_size elastic_checkpoint "
    "ignore_unused_parameters zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients leaf_module "
    "load_from_fp32_weights stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_gather_16bit_weights_on_model_save "
    "stage3_module_granularity_threshold cpu_offload cpu_offload_param cpu_offload_use_pin_memory",
    "zero_optimization.offload_param": "device nvme_path pin_memory buffer_count buffer_size max_in_cpu",
    "zero_optimization.offload_optimizer": "device nvme_path pin_memory buffer_count ratio fast_init pipeline_read "
    "pipeline_write super_offload cpuadam_cores_perc",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events",
    "flops_profiler": "enabled profile_step module_depth top_modules detailed output_file recompute_fwd_factor",
    "activation_checkpointing": "partition_activations cpu_checkpointing contiguous_memory_optimization "
    "number_checkpoints synchronize_checkpoint_boundary profile",
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "comet": "enabled workspace project samples_log_interval experiment_name experiment_key online mode",
    "csv_monitor": "enabled output_path job_name",
    "comms_logger": "enabled verbose prof_all debug prof_ops",
    "data_types": "grad_accum_dtype",
    "timers.throughput": "enabled synchronized",
}


@pytest.mark.parametrize("section", DOCUMENTED)
def test_no_key_that_deepspeed_documents_is_unknown(section, tmp_path):
    """Some are refused, as not supported or removed, but none is taken for a misspelling."""
    for key in DOCUMENTED[section].split():
        raw: dict[str, Any] = {key: None}
        for name in reversed(section.split(".") if section else []):
            raw = {name: raw}
        assert complaints_about(raw, tmp_path) == []
