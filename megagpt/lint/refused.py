"""The keys with values that DeepSpeed takes and training refuses: a table of them with the reasons.

They would fail in the middle of a start, change numbers unseen, or blind the guards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from megagpt.config.run_file import RunConfig


@dataclass(frozen=True)
class Refused:
    """A key that training refuses `when(run, value)`; `why` ends the message that begins with "KEY=VALUE ".

    The key is a pattern of `fnmatch` over dotted keys.
    """

    key: str
    when: Callable[[RunConfig, Any], bool]
    why: str


def is_set(run: RunConfig, value: Any) -> bool:
    """Return the condition of keys that are refused with every value but false and null."""
    return value is not None and value is not False


def _stage(run: RunConfig) -> int:
    return run.deepspeed.zero_optimization.stage


def _offload_device(run: RunConfig) -> str:
    return run.deepspeed.zero_optimization.offload_optimizer.device


def _bf16_moments(run: RunConfig) -> bool:
    return bool(run.deepspeed_raw.get("bf16", {}).get("bf16_optimizer_states"))


def _nvme_without_path(section: str) -> Refused:
    def lacks_path(run: RunConfig, device: Any) -> bool:
        return (
            device == "nvme"
            and _stage(run) == 3
            and not run.deepspeed_raw["zero_optimization"][section].get("nvme_path")
        )

    key = f"zero_optimization.{section}"
    return Refused(f"{key}.device", lacks_path, f"needs a folder on the NVMe; set {key}.nvme_path")


def _autocast_dtype(run: RunConfig) -> Any:
    return run.deepspeed_raw["torch_autocast"].get("dtype")


BF16 = ("bfloat16", "bf16", "torch.bfloat16")  # as DeepSpeed reads it

ERRORS = (
    Refused("fp16.enabled", lambda run, on: on and run.deepspeed.bf16.enabled, "with bf16.enabled=true; choose one"),
    Refused(
        "fp16.enabled",
        lambda run, on: on and _stage(run) == 0,
        "at zero_optimization.stage=0: DeepSpeed divides the gradients by a loss scale that it did not multiply the "
        "loss by; set zero_optimization.stage to 1",
    ),
    Refused(
        "zero_optimization.zenflow",
        lambda run, value: value is not None,
        "is not supported: ZenFlow brings an optimizer of its own, and fails with Adam as megagpt builds it; remove it",
    ),
    Refused(
        "zero_optimization.offload_optimizer.super_offload",
        is_set,
        "is not supported: a process of its own updates the weights, whose steps the guards cannot skip; remove it",
    ),
    Refused(
        "zero_optimization.zero_quantized_*",
        is_set,
        "is not supported: weights or gradients are rounded to 8 or 4 bits on their way, which changes the losses; "
        "remove it",
    ),
    Refused(
        "zero_optimization.compute_grad_norm",
        lambda run, value: value is False,
        "leaves the gradient norm unknown, so that no step that is not finite is noticed or skipped; remove it",
    ),
    Refused(
        "gradient_allreduce_op",
        lambda run, value: value == "sum",
        "makes gradients, and what clipping does to them, grow with the number of ranks; remove it",
    ),
    Refused(
        "bf16.bf16_optimizer_states",
        lambda run, on: on and not run.deepspeed_raw["bf16"].get("bf16_master_weights_and_grads"),
        "needs bf16.bf16_master_weights_and_grads; set bf16.bf16_master_weights_and_grads to true, or remove this",
    ),
    Refused(
        "bf16.bf16_optimizer_states",
        lambda run, on: on and _offload_device(run) != "none",
        "does not work with zero_optimization.offload_optimizer; remove one of the two",
    ),
    *(
        Refused(key, lambda run, on: on and _stage(run) == 0, "needs ZeRO; set zero_optimization.stage to 1, 2 or 3")
        for key in ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads")
    ),
    Refused(
        "bf16.bf16_master_weights_and_grads",
        lambda run, on: on and not _bf16_moments(run) and not run.deepspeed.uses_cpu_adam("cuda"),
        "needs Adam's moments in bf16 too, or on the CPU; set bf16.bf16_optimizer_states to true, or "
        'zero_optimization.offload_optimizer to {"device": "cpu"} without optimizer.params.torch_adam',
    ),
    *(
        Refused(
            f"{dtype}.{dtype}_master_weights_and_grads",
            lambda run, on: on and run.deepspeed.optimizer.type == "Muon",
            'with optimizer.type "Muon", whose momentum loses small gradients in 16 bit; remove it',
        )
        for dtype in ("bf16", "fp16")
    ),
    Refused(
        "fp16.fp16_master_weights_and_grads",
        lambda run, on: on and not run.deepspeed.uses_cpu_adam("cuda"),
        "needs Adam's moments on the CPU; set zero_optimization.offload_optimizer to "
        '{"device": "cpu"} without optimizer.params.torch_adam',
    ),
    Refused(
        "torch_autocast.enabled",
        lambda run, on: on and run.deepspeed.dtype == "fp32" and _autocast_dtype(run) not in BF16,
        "without a dtype of bf16: a GPU then computes in float16 with a loss scale, which hides gradient norms from "
        'the guards; set torch_autocast.dtype to "bfloat16"',
    ),
    Refused(
        "zero_optimization.offload_optimizer.device",
        lambda run, device: device == "nvme" and run.megagpt.ema.decay is not None,
        "does not work with megagpt.ema.decay, whose average would have to be read from there in each step; remove "
        "megagpt.ema, or offload to the CPU",
    ),
    Refused(
        "megagpt.noise_scale",
        lambda run, on: on and run.deepspeed.fp16.enabled,
        "does not work with fp16.enabled, whose loss scale multiplies the gradients of micro-batches; train in bf16, "
        "or remove it",
    ),
    Refused(
        "megagpt.noise_scale",
        lambda run, on: on and run.deepspeed.sequence_parallel_size > 1,
        "does not work with sequence_parallel_size, where a rank has the gradient of a part of a sequence; remove one "
        "of the two",
    ),
    *(_nvme_without_path(section) for section in ("offload_optimizer", "offload_param")),
    *(
        Refused(
            f"{section}.enabled",
            lambda run, on, package=package: on and find_spec(package) is None,  # type: ignore[misc]
            f"needs the package {package}, which is not installed here; pip install {package}, or remove the section",
        )
        for section, package in {"wandb": "wandb", "comet": "comet_ml", "megagpt.mlflow": "mlflow"}.items()
    ),
    Refused(
        "steps_per_print",
        lambda run, n: n is not None and (not isinstance(n, int) or n <= 0),
        "is no number of steps; remove it, as megagpt prints the steps (megagpt.every.log)",
    ),
)
