"""Lint's rules: tables of the keys that can be without effect, contradict others, or matter when they are left out.

Keys are patterns of `fnmatch` over dotted keys. DeepSpeed's keys are checked if the file has them, ours if they differ
from their defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.config.deepspeed import OffloadConfig
from megagpt.config.run_file import RunConfig

When = Callable[[RunConfig], bool]


def never(run: RunConfig) -> bool:
    """Return the condition of keys that have no effect in any run."""
    return False


@dataclass(frozen=True)
class Acts:
    """Keys that have an effect only `when`; `why` ends the message that begins with "KEY=VALUE has no effect: "."""

    keys: tuple[str, ...]
    when: When
    why: str


@dataclass(frozen=True)
class Against:
    """A key whose value contradicts another's `when`; `why` ends the message that begins with "KEY=VALUE "."""

    key: str
    when: When
    why: str


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


# Of the rules for a key, the first whose condition is false is reported. Keys that DeepSpeed has removed are found in
# linter.py.
WITHOUT_EFFECT = (
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
    Acts(
        ("megagpt.early_stopping.min_steps",),
        lambda run: run.megagpt.early_stopping.patience > 0,
        "megagpt.early_stopping.patience is 0, so nothing stops early; set it or remove this",
    ),
    Acts(
        ("megagpt.data.val.*.weight",),
        lambda run: len(run.megagpt.deciding_sets) > 1,
        "val/loss is that of one set, and no mean; remove it",
    ),
    Acts(
        ("megagpt.data.val_tokens",),
        lambda run: any(one.tokens is None for one in run.megagpt.data.val.values()),
        "each validation set has tokens; remove one",
    ),
    Acts(
        ("megagpt.sample.*",),
        lambda run: run.megagpt.every.sample > 0,
        "megagpt.every.sample is 0, so no text is generated; set it or remove this",
    ),
    Acts(
        ("megagpt.tasks",),
        lambda run: run.megagpt.every.tasks > 0,
        "megagpt.every.tasks is 0, so no task is run; set it or remove this",
    ),
    Acts(
        ("megagpt.sample.top_k", "megagpt.sample.top_p"),
        lambda run: run.megagpt.sample.temperature > 0,
        "temperature 0 always takes the likeliest token; remove it or raise the temperature",
    ),
    Acts(
        ("megagpt.augment.fim.*",),
        lambda run: run.megagpt.augment.fim.rate > 0,
        "megagpt.augment.fim.rate is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.augment.span_corruption.*",),
        lambda run: run.megagpt.augment.span_corruption.rate > 0,
        "megagpt.augment.span_corruption.rate is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.augment.span_corruption.sentinels",),
        lambda run: run.megagpt.augment.span_corruption.pieces is None,
        "the sentinels are given by pieces; remove one of the two",
    ),
    Acts(
        ("megagpt.augment.token_dropout.*",),
        lambda run: run.megagpt.augment.token_dropout.rate > 0,
        "megagpt.augment.token_dropout.rate is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.augment.goldfish.*",),
        lambda run: run.megagpt.augment.goldfish.k > 0,
        "megagpt.augment.goldfish.k is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.guards.spikes.window", "megagpt.guards.spikes.sigma"),
        lambda run: run.megagpt.guards.spikes.action != "none",
        'megagpt.guards.spikes.action is "none"; choose one or remove this',
    ),
    Acts(
        ("megagpt.schedule.min_lr_ratio", "megagpt.schedule.end_step"),
        lambda run: run.megagpt.schedule.shape != "constant",
        "a constant learning rate does not fall; remove it or choose another shape",
    ),
    Acts(
        ("megagpt.regularization.weight_decay_on",),
        lambda run: run.deepspeed.optimizer.params.weight_decay > 0,
        "optimizer.params.weight_decay is 0; set it or remove this",
    ),
)

CONTRADICTIONS = (
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
        "zero_optimization.offload_optimizer.device",
        lambda run: _offload(run).device == "nvme" and 0 < _stage(run) < 3,
        'is "cpu" at stages 1 and 2, where DeepSpeed has no NVMe; write "cpu", or set zero_optimization.stage to 3',
    ),
    Against(
        "megagpt.early_stopping.patience",
        lambda run: run.megagpt.every.eval == 0,
        "counts evaluations, and megagpt.every.eval=0 leaves only the last; set megagpt.every.eval or remove it",
    ),
    Against(
        "megagpt.early_stopping.min_steps",
        lambda run: run.megagpt.early_stopping.min_steps >= run.megagpt.schedule.max_steps,
        "is not before megagpt.schedule.max_steps, so nothing stops early; lower it",
    ),
    *(
        Against(
            f"megagpt.every.{what}",
            lambda run, what=what: getattr(run.megagpt.every, what) > run.megagpt.schedule.max_steps,  # type: ignore[misc]
            f"is more than megagpt.schedule.max_steps: only the end {will}; lower it, or write 0 if you want that",
        )
        for what, will in {"eval": "evaluates", "save": "saves"}.items()
    ),
    Against(
        "megagpt.model.n_head",
        lambda run: run.megagpt.model.head_dim % 8 != 0,
        "makes heads whose width is not a multiple of 8, for which GPUs have no fast attention; change it or "
        "megagpt.model.n_embd",
    ),
)

# Keys whose default matters, or differs from other trainers' -> (when to mention it if the key is left out, the note).
DEFAULTS: dict[str, tuple[When, str]] = {
    "gradient_clipping": (
        lambda run: True,
        "gradients are clipped to norm 1.0; DeepSpeed did not clip before 0.19",
    ),
    "optimizer.params.weight_decay": (lambda run: True, "0.0, where torch's AdamW has 0.01 and GPT-3 had 0.1"),
    "optimizer.params.betas": (lambda run: True, "(0.9, 0.95) as GPT-3 had, where torch has (0.9, 0.999)"),
    "bf16": (lambda run: run.deepspeed.dtype == "fp32", "without bf16 or fp16, everything is computed in fp32"),
    "zero_optimization.offload_optimizer.pin_memory": (
        lambda run: _stage(run) > 0 and _offload(run).device != "none",
        "true since DeepSpeed 0.19, which locks the moments' host memory; write false where `ulimit -l` is low",
    ),
    "megagpt.schedule.warmup_steps": (lambda run: True, "0: the first step has the full learning rate"),
}
