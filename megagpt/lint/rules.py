"""Lint's rules: tables of the keys that can be without effect, contradict others, or matter when they are left out.

Keys are patterns of `fnmatch` over dotted keys. DeepSpeed's keys are checked if the file has them, ours if they differ
from their defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.config.run_file import RunConfig

When = Callable[[RunConfig], bool]


def evaluations(run: RunConfig) -> int:
    """Return how often the run evaluates: every `every.eval` steps, and at the last one."""
    every, steps = run.megagpt.every.eval, run.megagpt.schedule.max_steps
    return -(-steps // every) if every else 1


def tokens_that_patience_has(run: RunConfig) -> int:
    """Return how many tokens the run trains on after its first evaluation, which improves on none.

    The gap to the training loss can be too large from the first evaluation on.
    """
    before = 0 if run.megagpt.early_stopping.max_gap is not None else run.megagpt.every.eval
    return run.tokens(run.megagpt.schedule.max_steps) - run.tokens(before)


def tokens_between_evaluations(run: RunConfig) -> int:
    """Return how many tokens the last `every.eval` steps train on, when a batch that grows is whole."""
    steps = run.megagpt.schedule.max_steps
    return run.tokens(steps) - run.tokens(max(0, steps - run.megagpt.every.eval))


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


# Of the rules for a key, the first whose condition is false is reported. Those for DeepSpeed's keys are in
# deepspeed_rules.py, and keys that it has removed are found in linter.py.
WITHOUT_EFFECT = (
    Acts(
        ("megagpt.early_stopping.min_steps",),
        lambda run: run.megagpt.early_stopping.stops,
        "megagpt.early_stopping.patience is 0, so nothing stops early; set it or remove this",
    ),
    Acts(
        ("megagpt.early_stopping.smoothing",),
        lambda run: run.megagpt.early_stopping.patience > 0 or run.megagpt.early_stopping.patience_tokens is not None,
        "it is for megagpt.early_stopping.patience or megagpt.early_stopping.patience_tokens; set one or remove this",
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
        ("megagpt.schedule.first_batch",),
        lambda run: run.megagpt.schedule.first_batch != run.deepspeed.train_batch_size,
        "it is all of train_batch_size; lower it, or remove it and megagpt.schedule.batch_ramp_steps",
    ),
    Acts(
        ("megagpt.schedule.first_seq_len",),
        lambda run: run.megagpt.schedule.first_seq_len != run.megagpt.seq_len,
        "rows are no longer; lower it, or remove it and megagpt.schedule.seq_len_warmup_steps",
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
        ("optimizer.params.lr_scale.head",),
        lambda run: not run.megagpt.model.tied,
        "the head is the token embedding; set megagpt.model.tied to false, or remove it",
    ),
    Acts(
        ("optimizer.params.lr_scale.scalars",),
        lambda run: run.megagpt.model.value_residual or run.megagpt.model.embedding_shortcut,
        "the model has none; set megagpt.model.value_residual or megagpt.model.embedding_shortcut, or remove it",
    ),
    Acts(
        ("megagpt.schedule.momentum_warmup_steps",),
        lambda run: run.deepspeed.optimizer.type == "Muon",
        "it is for Muon's momentum; set optimizer.type to Muon or remove this",
    ),
    Acts(
        ("megagpt.schedule.weight_decay_shape",),
        lambda run: run.deepspeed.optimizer.params.weight_decay > 0,
        "optimizer.params.weight_decay is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.schedule.min_lr_ratio", "megagpt.schedule.end_step"),
        lambda run: run.megagpt.schedule.shape != "constant",
        "a constant learning rate does not fall; remove it or choose another shape",
    ),
    Acts(
        ("megagpt.regularization.dropout",),
        lambda run: None in run.megagpt.regularization.own_dropouts,
        "megagpt.regularization.embedding_dropout, megagpt.regularization.attention_dropout and "
        "megagpt.regularization.residual_dropout are all set; remove it",
    ),
    Acts(
        ("megagpt.regularization.stochastic_depth_shape",),
        lambda run: run.megagpt.regularization.stochastic_depth > 0,
        "megagpt.regularization.stochastic_depth is 0; set it or remove this",
    ),
    Acts(
        ("megagpt.regularization.weight_decay_on", "optimizer.params.cautious_weight_decay"),
        lambda run: run.deepspeed.optimizer.params.weight_decay > 0,
        "optimizer.params.weight_decay is 0; set it or remove this",
    ),
)

CONTRADICTIONS = (
    *(
        Against(
            f"megagpt.early_stopping.{key}",
            lambda run: run.megagpt.early_stopping.stops and run.megagpt.every.eval == 0,
            f"{does} evaluations, and megagpt.every.eval=0 leaves only the last; set megagpt.every.eval or remove it",
        )
        for key, does in {
            "patience": "counts",
            "patience_tokens": "is looked at after",
            "max_gap": "is looked at after",
        }.items()
    ),
    Against(
        "megagpt.early_stopping.smoothing",
        lambda run: run.megagpt.early_stopping.smoothing + run.megagpt.early_stopping.patience > evaluations(run),
        "and megagpt.early_stopping.patience need more evaluations than the run has (megagpt.every.eval, "
        "megagpt.schedule.max_steps), so patience never ends the run; lower it or megagpt.every.eval",
    ),
    Against(
        "megagpt.early_stopping.patience_tokens",
        lambda run: (run.megagpt.early_stopping.patience_tokens or 0) >= tokens_that_patience_has(run),
        "is as much as the run trains on from its first evaluation (megagpt.every.eval) to its end "
        "(megagpt.schedule.max_steps), or more, so nothing stops early; lower it",
    ),
    Against(
        "megagpt.early_stopping.patience_tokens",
        lambda run: (run.megagpt.early_stopping.patience_tokens or 0) < tokens_between_evaluations(run),
        "is less than the tokens between two evaluations (megagpt.every.eval) at the end of the run, so that one "
        "without an improvement ends it; raise it, or set megagpt.early_stopping.patience to 1 in its place",
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
        "megagpt.regularization.stochastic_depth",
        lambda run: run.megagpt.regularization.stochastic_depth > 0 and run.megagpt.model.n_layer == 1,
        "skips the only block, so that samples train the embeddings alone; remove it, or raise megagpt.model.n_layer",
    ),
    Against(
        "megagpt.model.sliding_window",
        lambda run: (run.megagpt.model.sliding_window or 0) >= run.megagpt.model.seq_len,
        "is not less than megagpt.model.seq_len, so that blocks attend to all positions; lower it, or remove it",
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
        lambda run: (
            run.deepspeed.zero_optimization.stage > 0
            and run.deepspeed.zero_optimization.offload_optimizer.device != "none"
        ),
        "true since DeepSpeed 0.19, which locks the moments' host memory; write false where `ulimit -l` is low",
    ),
    "zero_optimization.overlap_comm": (
        lambda run: (
            run.deepspeed.zero_optimization.stage == 2
            and run.deepspeed.zero_optimization.offload_optimizer.device == "none"
        ),
        "false below stage 3, so that backward waits while each bucket of gradients is sent, in every micro-batch; on "
        "several GPUs write true (`megagpt plan` says what it gains)",
    ),
    "megagpt.schedule.warmup_steps": (lambda run: True, "0: the first step has the full learning rate"),
}
