"""Choose a run's size, batch and number of steps for a dataset, a machine and a time, for `megagpt init`.

The rules are simple and each choice says its own; memory and time are the planner's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megagpt.config.model import ModelConfig
from megagpt.config.run_file import SECTION, RunConfig, parse_run
from megagpt.errors import UserError
from megagpt.model.flops import n_params
from megagpt.planner.estimate import GIB, Machine, Setting, setting

# Tokens to train on for each parameter (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models").
TOKENS_PER_PARAMETER = 20
# Text that is read up to this many times is nearly as good as new text (Muennighoff et al. 2023, "Scaling
# Data-Constrained Language Models").
EPOCHS = 4
STEPS = 2000  # that the batch aims at
SMALLEST_BATCH = 8  # sequences
LARGEST_BATCH = 524_288  # tokens: GPT-3's for its smallest model
MICRO_BATCH_TOKENS = 8192  # on a CPU, where more at a time are no faster
MOST_GPUS = 8  # that the batch can be divided over


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2, and a peak learning rate for its width."""

    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int
    lr: float

    @property
    def model(self) -> ModelConfig:
        """The run file's section."""
        return ModelConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, seq_len=self.seq_len)


# From a toy to GPT-2 XL. Rates of the widths from 768 on are those of GPT-3's table 2.1 (Brown et al. 2020).
SHAPES = (
    Shape(2, 2, 64, 64, 3e-3),
    Shape(4, 4, 128, 128, 2e-3),
    Shape(4, 4, 192, 128, 2e-3),
    Shape(6, 6, 384, 256, 1e-3),
    Shape(8, 8, 512, 512, 1e-3),
    Shape(12, 12, 768, 1024, 6e-4),
    Shape(24, 16, 1024, 1024, 3e-4),
    Shape(36, 20, 1280, 1024, 2.5e-4),
    Shape(48, 25, 1600, 1024, 2e-4),
)


@dataclass(frozen=True)
class Data:
    """The facts about a dataset that the choice depends on."""

    path: str
    train_tokens: int
    val_tokens: int
    vocab_size: int  # padded


@dataclass(frozen=True)
class Choice:
    """A run of one shape; `against` says why it is too large, and is empty if it is not."""

    shape: Shape
    data: Data
    on: Machine
    dtype: str
    params: int
    batch: int  # sequences
    micro_batch: int
    steps: int
    against: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.shape.seq_len

    @property
    def epochs(self) -> float:
        return self.tokens / self.data.train_tokens

    @property
    def estimate(self) -> Setting:
        """Return the planner's memory and time of a step."""
        return setting(self.run("runs/x"), self.on, self.data.vocab_size)

    @property
    def hours(self) -> float:
        """Return the hours of training, without evaluating and saving."""
        return self.steps * self.estimate.seconds / 3600

    @property
    def val_windows(self) -> int | None:
        """Return the windows of an evaluation, ten of which take about a tenth of the time; None if it reads all."""
        windows = max(SMALLEST_BATCH, self.tokens // 30 // self.shape.seq_len)
        return windows if windows < (self.data.val_tokens - 1) // self.shape.seq_len else None

    def run(self, out_dir: str) -> RunConfig:
        """Return the run, checked."""
        return parse_run(self.as_raw(out_dir))

    def as_raw(self, out_dir: str) -> dict[str, Any]:
        """Return the run file's object."""
        shape, tenth = self.shape, max(1, self.steps // 10)
        precision = {self.dtype: {"enabled": True}} if self.dtype != "fp32" else {"bf16": {"enabled": False}}
        return {
            "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_clipping": 1.0,
            **precision,
            "zero_optimization": {"stage": 0 if self.dtype == "fp32" else 1},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": shape.lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
            },
            "tensorboard": {"enabled": True},
            SECTION: {
                "out_dir": out_dir,
                "model": shape.model.model_dump(include={"n_layer", "n_head", "n_embd", "seq_len"}),
                "data": {
                    "train": [{"path": self.data.path}],
                    "val": self.data.path,
                    "val_tokens": self.val_windows and self.val_windows * shape.seq_len,
                },
                "schedule": {"max_steps": self.steps, "warmup_steps": self.steps // 20, "shape": "cosine"},
                "early_stopping": {"patience": 4, "restore_best": True},
                "every": {
                    "log": max(1, self.steps // 50),
                    "eval": tenth,
                    "save": max(1, self.steps // 4),
                    "sample": tenth,
                },
            },
        }


def choose(data: Data, on: Machine, dtype: str, hours: float) -> tuple[Choice, Choice | None]:
    """Return the run of the largest model that nothing speaks against, and that of the next larger, which is refused.

    If all are too large for the data or the time it is the smallest, with as many steps as they allow. Raises
    UserError if it does not even have a sequence to train on.
    """
    shortest = SHAPES[0].seq_len
    for split, n_tokens in (("train", data.train_tokens), ("val", data.val_tokens)):
        if n_tokens <= shortest:
            raise UserError(
                f"{data.path} has {n_tokens:,} tokens in its {split!r} split, and the smallest model reads "
                f"{shortest + 1} at a time; build the data again from more text, or with another val_fraction"
            )
    candidates = list(_candidates(data, on, dtype, hours))
    good = [i for i, candidate in enumerate(candidates) if not candidate.against]
    if good:
        best = good[-1]
        return candidates[best], candidates[best + 1] if best + 1 < len(candidates) else None
    smallest = candidates[0]
    affordable = int(hours * 3600 / smallest.estimate.seconds)
    return replace(smallest, steps=_even(min(smallest.steps, affordable))), candidates[1]


def _candidates(data: Data, on: Machine, dtype: str, hours: float) -> Iterator[Choice]:
    for shape in SHAPES:
        params = n_params(shape.model, data.vocab_size)
        wanted = TOKENS_PER_PARAMETER * params
        tokens = min(wanted, EPOCHS * data.train_tokens)
        batch = _batch(tokens, shape.seq_len)
        choice = Choice(shape, data, on, dtype, params, batch, 1, _even(tokens // (batch * shape.seq_len)))
        choice = replace(choice, micro_batch=_micro_batch(choice))
        yield replace(choice, against=_against(choice, wanted, hours))


def _even(steps: int) -> int:
    """Round down to a multiple of 20, so that the end is the last of ten evaluations and of four saves."""
    return max(1, steps - steps % 20 if steps >= 20 else steps)


def _batch(tokens: int, seq_len: int) -> int:
    """Return the power of two of sequences with which the tokens are about STEPS steps."""
    batch = SMALLEST_BATCH
    while 2 * batch * seq_len <= min(LARGEST_BATCH, tokens / STEPS):
        batch *= 2
    return batch


def _micro_batch(choice: Choice) -> int:
    """Return the largest power of two that fits the memory; 1 if none does."""
    on_cpu = choice.dtype == "fp32"
    most = MICRO_BATCH_TOKENS // choice.shape.seq_len if on_cpu else choice.batch // MOST_GPUS
    micro_batch = 1
    while 2 * micro_batch <= min(choice.batch, most) and replace(choice, micro_batch=2 * micro_batch).estimate.fits:
        micro_batch *= 2
    return micro_batch


def _against(choice: Choice, wanted: int, hours: float) -> str:
    """Return why the model is too large for the data, the memory or the time; "" if it is not."""
    data, seq_len = choice.data, choice.shape.seq_len
    if min(data.train_tokens, data.val_tokens) <= seq_len:
        return f"needs more than {seq_len} tokens in each split"
    if wanted > EPOCHS * data.train_tokens:
        return f"wants {wanted:,} tokens, and {EPOCHS} epochs of this data are {EPOCHS * data.train_tokens:,}"
    if not choice.estimate.fits:
        return f"needs {choice.estimate.total / GIB:.0f} GiB, and there are {choice.on.gpu.memory_gib:.0f}"
    if choice.hours > hours:
        return f"would take about {choice.hours:,.1f} hours, and --hours is {hours:g}"
    return ""
