"""The keys of DeepSpeed's part of a run file: those that DeepSpeed reads, and those that are refused here.

DeepSpeed ignores a misspelt key at its top level and in its untyped sections, so these lists find it instead. They were
read from DeepSpeed 0.19.8; tests/lint/test_deepspeed_keys.py compares them with the source of the installed one and
prints what to change.
"""

from typing import Any

# Every key that is accepted -> DeepSpeed's default. A value must be true or false, or a number, where its default is.
# None: there is no default, or a model checks the value. A dict is a section whose keys DeepSpeed reads one by one; the
# sections that it checks with pydantic models of its own are in engine/deepspeed_models.py.
DEEPSPEED_DEFAULTS: dict[str, Any] = {
    "activation_checkpointing": None,
    "aio": {
        "block_size": 1048576,
        "intra_op_parallelism": 1,
        "overlap_events": True,
        "queue_depth": 8,
        "single_submit": False,
        "use_gds": False,
    },
    "bf16": None,
    "comet": None,
    "comms_logger": None,
    "communication_data_type": None,
    "csv_monitor": None,
    "data_types": {
        "buffer_dtype": None,
        "grad_accum_dtype": None,
        "keep_in_fp32_modules": None,
        "param_dtype": None,
    },
    "dataloader_drop_last": False,
    "disable_allgather": False,
    "disable_python_gc": False,
    "dump_state": False,
    "flops_profiler": {
        "detailed": True,
        "enabled": False,
        "module_depth": -1,
        "output_file": None,
        "profile_step": 1,
        "recompute_fwd_factor": 0.0,
        "top_modules": 1,
    },
    "fp16": None,
    "gradient_accumulation_steps": None,
    "gradient_allreduce_op": "mean",
    "gradient_clipping": 1.0,
    "gradient_predivide_factor": 1.0,
    "log_level": None,
    "memory_breakdown": False,
    "optimizer": None,
    "prescale_gradients": False,
    "sequence_parallel_size": None,
    "steps_per_print": None,
    "tensorboard": None,
    "timers": {"throughput": None},
    "torch_autocast": {"dtype": None, "enabled": False, "lower_precision_safe_modules": None},
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "vocabulary_size": None,
    "wall_clock_breakdown": False,
    "wandb": None,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "zero_optimization": None,
}

DEEPSPEED_KEYS = frozenset(DEEPSPEED_DEFAULTS)

# What the keys do that no model of ours describes.
DESCRIPTIONS = {
    "aio": "asynchronous reads and writes of what is offloaded to NVMe",
    "comet": "Comet gets the metrics; needs the package comet_ml",
    "comms_logger": "log each collective with its size and time",
    "data_types": "types of buffers and of accumulated gradients",
    "dataloader_drop_last": "without effect: megagpt brings its own loader",
    "disable_allgather": "without effect: DeepSpeed never uses it",
    "disable_python_gc": "switch Python's garbage collection off while training",
    "dump_state": "print the engine's settings at the start",
    "flops_profiler": "profile the operations of one step",
    "gradient_allreduce_op": "how gradients are combined over ranks",
    "gradient_predivide_factor": "with prescale_gradients: divisor before the sum",
    "log_level": "of DeepSpeed's own lines",
    "memory_breakdown": "print the memory in use at each step",
    "steps_per_print": "steps between DeepSpeed's own lines; megagpt prints its own",
    "timers": "timers inside of DeepSpeed",
    "torch_autocast": "compute in 16 bit by torch.autocast, with fp32 weights",
    "vocabulary_size": "without effect: the vocabulary is the tokenizer's",
    "wall_clock_breakdown": "print the time of forward, backward and step",
    "zero_allow_untested_optimizer": "without effect: Adam is tested",
    "zero_force_ds_cpu_optimizer": "with offload: only DeepSpeed's CPUAdam",
}

# The keys that name a file or a folder which DeepSpeed writes.
DEEPSPEED_PATHS = (
    "tensorboard.output_path",
    "csv_monitor.output_path",
    "flops_profiler.output_file",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.nvme_path",
)

# The untyped sections -> their keys.
DEEPSPEED_SECTIONS = {name: set(keys) for name, keys in DEEPSPEED_DEFAULTS.items() if isinstance(keys, dict)}

_DATA_PARALLEL = "megagpt is data and sequence parallel only; remove it"
_OWN_CHECKPOINTS = "megagpt commits checkpoints itself; see megagpt.every.save"
_SHORT_ROWS = (
    "for a warm-up of the sequence length set megagpt.schedule.seq_len_warmup_steps and "
    "megagpt.schedule.first_seq_len; remove it"
)

# Keys that DeepSpeed reads but that megagpt does not support -> why. They are refused instead of ignored.
REFUSED_KEYS = {
    "autotuning": "sizes are chosen by hand; remove it",
    "bfloat16": 'write "bf16"',
    "checkpoint": _OWN_CHECKPOINTS,
    "compile": "blocks are compiled by torch; see megagpt.compile",
    "curriculum_learning": _SHORT_ROWS,
    "data_efficiency": _SHORT_ROWS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "expert_parallel": _DATA_PARALLEL,
    "hybrid_engine": "it is for RLHF; remove it",
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed's default; remove it",
    "pipeline": _DATA_PARALLEL,
    "scheduler": "the learning rate comes from megagpt.schedule; remove it",
    "seq_parallel_communication_data_type": "gradients are reduced over all ranks alike; see communication_data_type",
    "tensor_parallel": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": _DATA_PARALLEL,
    "weight_quantization": "it is for inference; remove it",
}
