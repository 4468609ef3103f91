"""Lint's rules on DeepSpeed's keys: those without effect, and those that contradict others."""

from megagpt.config.deepspeed import OffloadConfig
from megagpt.config.run_file import RunConfig
from megagpt.lint.rules import Acts, Against, never


def _zero(*names: str) -> tuple[str, ...]:
    return tuple(f"zero_optimization.{name}" for name in names)


def _stage(run: RunConfig) -> int:
    return run.deepspeed.zero_optimization.stage


def _is_of_another_muon(run: RunConfig, key: str) -> bool:
    """Tell whether this key decides on Muon's rate, and is so high that it makes steps of 0.1 on Jordan's scale."""
    optimizer = run.deepspeed.optimizer
    decides = optimizer.type == "Muon" and key == ("lr" if optimizer.params.muon_lr is None else "muon_lr")
    return decides and optimizer.params.of_muon * 0.2 * run.megagpt.model.n_embd**0.5 > 0.1


def _offload(run: RunConfig) -> OffloadConfig:
    return run.deepspeed.zero_optimization.offload_optimizer


DEEPSPEED_WITHOUT_EFFECT = (
    Acts(
        _zero("*"),
        lambda run: _stage(run) > 0,
        "it is for ZeRO stages 1 to 3, and stage is 0; set zero_optimization.stage or remove it",
    ),
    Acts(
        _zero(
            *("stage3_*", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_*", "memory_efficient_linear"),
            *("override_module_apply", "pipeline_loading_checkpoint", "log_trace_cache_warnings", "leaf_module"),
            *("enable_sanity_checks", "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters"),
            *("model_persistence_threshold", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
            *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
            "offload_optimizer.ratio",
        ),
        lambda run: _stage(run) == 3,
        "it is for ZeRO stage 3; set zero_optimization.stage to 3 or remove it",
    ),
    Acts(
        _zero(
            *("round_robin_gradients", "use_multi_rank_bucket_allreduce", "allgather_bucket_size"),
            *("allgather_partitions", "parameter_alignment", "ignore_unused_parameters"),
        ),
        lambda run: _stage(run) < 3,
        "it is for ZeRO stages 1 and 2; remove it",
    ),
    Acts(
        _zero("*gather_*16*_weights_on_model_save"),
        never,
        "it is for save_16bit_model(), and checkpoints are megagpt's own; remove it",
    ),
    Acts(
        _zero("elastic_checkpoint", "load_from_fp32_weights"),
        never,
        "megagpt itself resumes with another number of ranks or dtype, without loss; remove it",
    ),
    Acts(
        _zero("save_muon_momentum_buffer_in_memory"),
        never,
        "it is for DeepSpeed's Muon, and megagpt's keeps its momentum as Adam keeps its moments; remove it",
    ),
    Acts(
        _zero("offload_optimizer.?*"),
        lambda run: _offload(run).device != "none",
        'its device is "none"; set zero_optimization.offload_optimizer.device to "cpu" or remove the section',
    ),
    Acts(
        _zero("offload_param.?*"),
        lambda run: run.deepspeed.zero_optimization.offload_param.device != "none",
        'its device is "none"; set zero_optimization.offload_param.device to "cpu" or remove the section',
    ),
    Acts(
        _zero(*(f"offload_optimizer.{key}" for key in ("nvme_path", "buffer_count", "pipeline_*", "fast_init"))),
        lambda run: _offload(run).device == "nvme",
        'it is for offload_optimizer.device "nvme"; remove it',
    ),
    Acts(
        _zero(*(f"offload_param.{key}" for key in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"))),
        lambda run: run.deepspeed.zero_optimization.offload_param.device == "nvme",
        'it is for offload_param.device "nvme"; remove it',
    ),
    Acts(
        _zero("offload_optimizer.cpuadam_cores_perc"),
        never,
        "it is for offload_optimizer.super_offload, which is not supported; remove it",
    ),
    Acts(
        ("aio.*",),
        lambda run: "nvme" in (_offload(run).device, run.deepspeed.zero_optimization.offload_param.device),
        "nothing is offloaded to NVMe; remove it",
    ),
    Acts(
        ("optimizer.params.torch_adam", "zero_force_ds_cpu_optimizer"),
        lambda run: _offload(run).device != "none",
        "it chooses the Adam of offloaded moments, and none are offloaded; set zero_optimization.offload_optimizer or "
        "remove it",
    ),
    Acts(
        tuple(f"fp16.{key}" for key in ("initial_scale_power", "loss_scale_window", "*hysteresis", "min_loss_scale")),
        lambda run: not run.deepspeed.fp16.loss_scale,
        "fp16.loss_scale fixes the scale; remove one of the two",
    ),
    Acts(
        ("gradient_predivide_factor",),
        lambda run: not run.deepspeed.prescale_gradients,
        "with prescale_gradients, gradients are divided by the number of ranks in one go; remove one of the two",
    ),
    Acts(
        ("torch_autocast.*",),
        lambda run: run.deepspeed.dtype == "fp32",
        "everything is computed in 16 bit already; remove it, or bf16 and fp16",
    ),
    Acts(("zero_allow_untested_optimizer",), never, "Adam is an optimizer that DeepSpeed has tested; remove it"),
    Acts(("dataloader_drop_last",), never, "megagpt brings its own loader, which drops nothing; remove it"),
    Acts(("disable_allgather",), never, "DeepSpeed reads it but never uses it; remove it"),
    Acts(("vocabulary_size",), never, "the vocabulary is the tokenizer's, padded to a multiple of 128; remove it"),
)

DEEPSPEED_CONTRADICTIONS = (
    Against(
        "optimizer.params.adam_w_mode",
        lambda run: run.deepspeed.optimizer.type == "AdamW",
        'with type "AdamW", which always decouples weight decay; write type "Adam" or remove it',
    ),
    Against(
        "optimizer.params.lr",
        lambda run: run.deepspeed.optimizer.params.lr > 0.1,
        "is about the change of each weight in each step of Adam, and weights start at a size of 0.02; 6e-4 is usual",
    ),
    *(
        Against(
            f"optimizer.params.{key}",
            lambda run, key=key: _is_of_another_muon(run, key),  # type: ignore[misc]
            "is a rate of Muon without the factor 0.2 sqrt(width), which gives its steps the size of Adam's here (Liu "
            "et al. 2025); divide it by that factor, or write a rate that suits AdamW",
        )
        for key in ("lr", "muon_lr")
    ),
    Against(
        "communication_data_type",
        lambda run: run.deepspeed.dtype != "fp16" and run.deepspeed.communication_data_type == "fp16",
        "in a run that is not fp16 has no loss scale to keep gradients in fp16's range; write bf16 or remove it",
    ),
    Against(
        "data_types.grad_accum_dtype",
        lambda run: run.deepspeed.dtype != "fp16" and run.deepspeed_raw["data_types"]["grad_accum_dtype"] == "fp16",
        "in a run that is not fp16 has no loss scale to keep gradients in fp16's range; write bf16 or remove it",
    ),
    Against(
        "zero_optimization.contiguous_gradients",
        lambda run: (
            0 < _stage(run) < 3
            and run.deepspeed.zero_optimization.overlaps
            and run.deepspeed_raw["zero_optimization"]["contiguous_gradients"] is False
        ),
        "makes DeepSpeed wait for the device before each bucket, which zero_optimization.overlap_comm is to avoid; "
        "remove one of the two",
    ),
    Against(
        "zero_optimization.offload_optimizer.device",
        lambda run: _offload(run).device == "nvme" and 0 < _stage(run) < 3,
        'is "cpu" at stages 1 and 2, where DeepSpeed has no NVMe; write "cpu", or set zero_optimization.stage to 3',
    ),
)
