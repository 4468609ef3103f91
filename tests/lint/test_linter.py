import json
from typing import Any

import pytest
from support import GOOD, RUN_FILES

from megagpt.__main__ import main
from megagpt.config.parsing import dotted_items
from megagpt.config.run_file import load_run_config, parse_run
from megagpt.errors import UserError
from megagpt.lint.linter import effective, lint_file, lint_or_raise

SOUND: dict[str, Any] = {
    **GOOD,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "megagpt": {**GOOD["megagpt"], "schedule": {"max_steps": 2000, "warmup_steps": 10}},
}


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SOUND))
    return path


def test_a_sound_run_file_has_no_findings(sound):
    assert lint_file(sound) == []


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_shipped_run_file_is_clean(path):
    """On a CPU a run file may leave bf16 out, and is told what that means."""
    assert [str(finding) for finding in lint_file(path) if (finding.level, finding.key) != ("note", "bf16")] == []


MUON = ["optimizer.type=Muon"]
DROPOUTS = ("dropout", "embedding_dropout", "attention_dropout", "residual_dropout")
FP16 = ["bf16.enabled=false", "fp16.enabled=true"]
MASTERS = ["bf16.bf16_master_weights_and_grads=true"]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZENFLOW = "zero_optimization.zenflow"
STOPPING = "megagpt.early_stopping"
GRAD_NORM = "zero_optimization.compute_grad_norm"


def zero(**section: Any) -> str:
    return f"zero_optimization={json.dumps(section)}"


MISTAKES = [
    # unknown, at every level, and the nearest name
    (["gradient_cliping=1.0"], "error", "gradient_cliping", "did you mean 'gradient_clipping'?"),
    (["zero_optimization.stag=2"], "error", "zero_optimization.stag", "did you mean 'zero_optimization.stage'?"),
    (
        ["zero_optimization.offload_optimizer.devise=cpu"],
        "error",
        None,
        "offload_optimizer.device'?",
    ),
    (["bf16.enable=true"], "error", "bf16.enable", "did you mean 'bf16.enabled'?"),
    (["data_types.grad_acum_dtype=fp32"], "error", None, "did you mean 'data_types.grad_accum_dtype'?"),
    (["timers.throughput.synchronised=true"], "error", None, "did you mean 'timers.throughput.synchronized'?"),
    (
        ["activation_checkpointing.partitioned_activations=true"],
        "error",
        None,
        "checkpointing.partition_activations'?",
    ),
    (
        ["megagpt.schedule.warmup=3"],
        "error",
        "megagpt.schedule.warmup",
        "'megagpt.schedule.warmup_steps'?",
    ),
    (["optimizer.params.beta=0.9"], "error", "optimizer.params.beta", "did you mean 'optimizer.params.betas'?"),
    # removed or changed in the installed DeepSpeed
    (["elasticity.enabled=false"], "error", "elasticity", "was removed from DeepSpeed"),
    (
        ["curriculum_learning.enabled=true"],
        "error",
        None,
        "Here: for a warm-up of the sequence length set megagpt.schedule",
    ),
    (["zero_optimization.mics_shard_size=8"], "error", "zero_optimization.mics_shard_size", "was removed"),
    (["zero_optimization.cpu_offload=true"], "warning", None, "deprecated by the installed DeepSpeed; write offload"),
    # of a wrong value or type
    (["zero_optimization.overlap_comm=7"], "error", "zero_optimization.overlap_comm", "=7 is not true or false"),
    (["fp16.loss_scale=-1"], "error", "fp16.loss_scale", "must be >= 0"),
    (["zero_optimization.reduce_bucket_size=0"], "error", None, "more than 0"),
    (["wall_clock_breakdown=null"], "error", "wall_clock_breakdown", "=null is not true or false"),
    (["prescale_gradients=yes"], "error", "prescale_gradients", "'yes' is not true or false"),
    (["gradient_predivide_factor=null"], "error", "gradient_predivide_factor", "=null is not a number"),
    (["timers.throughput=3"], "error", "timers.throughput", "=3 is not a section {...}"),
    (["zero_optimization.stage=4"], "error", None, "zero_optimization.stage=4 is none of 0, 1, 2, 3"),
    (['megagpt.data.train=[{"path": "x", "weight": 0}]'], "error", None, "more than 0"),
    (["megagpt.model.n_head=3"], "error", "megagpt.model", "n_embd=32 is not a multiple of megagpt.model.n_head=3"),
    # not finite, or zero in fp32, which makes the weights of unused positions NaN
    (["optimizer.params.eps=1e-60"], "error", "optimizer.params.eps", ""),
    # not supported, or without effect at this stage or with this model
    (["pipeline.stages=2"], "error", "pipeline", "is not supported"),
    (["zero_optimization.stage3_max_live_parameters=10"], "warning", None, "it is for ZeRO stage 3"),
    (['zero_optimization={"stage": 3, "round_robin_gradients": true}'], "warning", None, "for ZeRO stages 1 and 2"),
    (['zero_optimization={"stage": 0, "overlap_comm": true}'], "warning", None, "and stage is 0"),
    (['zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}}'], "warning", None, "stage is 0"),
    (
        ["zero_optimization.offload_optimizer.pin_memory=true"],
        "warning",
        None,
        'set zero_optimization.offload_optimizer.device to "cpu"',
    ),
    (["aio.queue_depth=8"], "warning", "aio.queue_depth", "nothing is offloaded to NVMe"),
    (["activation_checkpointing.partition_activations=true"], "error", None, "has no effect without"),
    (["flops_profiler.profile_step=5"], "warning", "flops_profiler", "set flops_profiler.enabled to true"),
    (["optimizer.params.torch_adam=true"], "warning", "optimizer.params.torch_adam", "chooses the Adam of offloaded"),
    (["vocabulary_size=50257"], "warning", "vocabulary_size", "the vocabulary is the tokenizer's"),
    (
        [f"megagpt.regularization={json.dumps(dict.fromkeys(DROPOUTS, 0.1))}"],
        "warning",
        "megagpt.regularization.dropout",
        "are all set",
    ),
    (["megagpt.regularization.stochastic_depth_shape=constant"], "warning", None, "stochastic_depth is 0; set it"),
    (
        ["megagpt.regularization.stochastic_depth=0.5", "megagpt.model.n_layer=1"],
        "warning",
        "megagpt.regularization.stochastic_depth",
        "skips the only block",
    ),
    (["megagpt.regularization.stochastic_depth=1.0"], "error", None, "stochastic_depth=1.0 is too large"),
    (['optimizer.params.lr_scale={"scalars": 5}'], "warning", None, "the model has none"),
    (
        ["megagpt.model.sliding_window=1024"],
        "warning",
        "megagpt.model.sliding_window",
        "is not less than megagpt.model.seq_len",
    ),
    (["megagpt.sample.top_p=0.9"], "warning", "megagpt.sample.top_p", "every.sample is 0"),
    (["megagpt.augment.fim.spm_rate=0.9"], "warning", "megagpt.augment.fim.spm_rate", "augment.fim.rate is 0"),
    (["megagpt.schedule.shape=constant", "megagpt.schedule.min_lr_ratio=0.2"], "warning", None, "does not fall"),
    (
        ["megagpt.schedule.batch_ramp_steps=9", "megagpt.schedule.first_batch=8", "train_batch_size=8"],
        "warning",
        "megagpt.schedule.first_batch",
        "it is all of train_batch_size; lower it, or remove it and megagpt.schedule.batch_ramp_steps",
    ),
    (
        ["megagpt.schedule.seq_len_warmup_steps=9", "megagpt.schedule.first_seq_len=64", "megagpt.data.seq_len=64"],
        "warning",
        "megagpt.schedule.first_seq_len",
        "rows are no longer; lower it, or remove it and megagpt.schedule.seq_len_warmup_steps",
    ),
    # against another
    (["fp16.enabled=true"], "error", "fp16.enabled", "fp16.enabled=true with bf16.enabled=true; choose one"),
    ([*FP16, "zero_optimization.stage=0"], "error", "fp16.enabled", "set zero_optimization.stage to 1"),
    ([*FP16, "fp16.loss_scale=128", "fp16.hysteresis=4"], "warning", "fp16.hysteresis", "fixes the scale"),
    (["prescale_gradients=true", "gradient_predivide_factor=2"], "warning", None, "divided by the number of ranks"),
    (["communication_data_type=fp16"], "warning", "communication_data_type", "write bf16 or remove it"),
    (["optimizer.params.adam_w_mode=false"], "warning", "optimizer.params.adam_w_mode", 'write type "Adam"'),
    (["optimizer.params.lr=6e4"], "warning", "optimizer.params.lr", "6e-4 is usual"),
    (["megagpt.early_stopping.patience=3", "megagpt.every.eval=0"], "warning", None, "leaves only the last"),
    *(
        ([f"{STOPPING}.{key}", "megagpt.every.eval=0"], "warning", f"{STOPPING}.{key.split('=')[0]}", "is looked at af")
        for key in ("patience_tokens=100000", "max_gap=0.5")
    ),
    (
        [f"{STOPPING}.patience=3", f"{STOPPING}.patience_tokens=50"],
        "error",
        STOPPING,
        "patience=3 counts evaluations, and megagpt.early_stopping.patience_tokens=50 tokens; remove one of the two",
    ),
    ([f"{STOPPING}.smoothing=3"], "warning", f"{STOPPING}.smoothing", "set one or remove this"),
    ([f"{STOPPING}.patience=1", f"{STOPPING}.smoothing=300"], "warning", None, "so patience never ends the run"),
    ([f"{STOPPING}.patience_tokens=5"], "warning", f"{STOPPING}.patience_tokens", "patience to 1 in its place"),
    (
        [
            "megagpt.schedule.batch_ramp_steps=1000",
            "megagpt.schedule.first_batch=4",
            f"{STOPPING}.patience_tokens=1500000",
        ],
        "warning",
        f"{STOPPING}.patience_tokens",
        "(megagpt.every.eval) at the end of the run",
    ),
    (
        ["megagpt.every.eval=1000", f"{STOPPING}.patience_tokens=9000000"],
        "warning",
        None,
        "from its first evaluation (megagpt.every.eval) to its end",
    ),
    *(
        (
            [f"{STOPPING}.max_gap=0.5", f"megagpt.{key}=0.1"],
            "error",
            "megagpt",
            f"is another loss or of another text; remove megagpt.early_stopping.max_gap, or set megagpt.{key}=0",
        )
        for key in (
            "regularization.label_smoothing",
            "regularization.z_loss",
            "augment.fim.rate",
            "augment.span_corruption.rate",
        )
    ),
    (["megagpt.every.save=5000"], "warning", "megagpt.every.save", "only the end saves"),
    (["train_batch_size=9"], "error", "train_batch_size", "set train_batch_size to 8"),
    # taken by DeepSpeed, and refused here
    *(
        ([f"gradient_clipping={clip}", zero(stage=stage, compute_grad_norm=False)], "error", GRAD_NORM, "unknown, so")
        for clip, stage in ((0, 1), (0, 2), (1, 2))
    ),
    (["gradient_clipping=0", zero(stage=3, compute_grad_norm=False)], "error", None, "Stage 1 or"),
    *(
        (
            [zero(stage=stage, zenflow=value, **more)],
            "error",
            "zero_optimization.zenflow",
            "ZenFlow brings an optimizer",
        )
        for stage, value, more in ((1, {}, {}), (2, {"topk_ratio": 0.1}, OFFLOAD), (3, {"topk_ratio": 0.1}, OFFLOAD))
    ),
    ([zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True})], "error", None, "guards cannot skip"),
    *(
        ([zero(stage=3, **{f"zero_quantized_{what}": True})], "error", None, "rounded to 8 or 4 bits")
        for what in ("weights", "gradients", "nontrainable_weights")
    ),
    (["gradient_allreduce_op=sum"], "error", "gradient_allreduce_op", "with the number of ranks"),
    (["bf16.bf16_optimizer_states=true"], "error", "bf16.bf16_optimizer_states", "needs bf16.bf16_master_weights_and"),
    (["bf16.bf16_master_weights_and_grads=true"], "error", None, "set bf16.bf16_optimizer_states to true, or"),
    ([*MASTERS, "bf16.bf16_optimizer_states=true", zero(**OFFLOAD, stage=2)], "error", None, "does not work with zero"),
    (
        [*MASTERS, zero(**OFFLOAD, stage=2), "optimizer.params.torch_adam=true"],
        "error",
        None,
        "without optimizer.params",
    ),
    ([*FP16, "fp16.fp16_master_weights_and_grads=true"], "error", "fp16.fp16_master_weights_and_grads", "on the CPU"),
    (["bf16.enabled=false", "torch_autocast.enabled=true"], "error", "torch_autocast.enabled", 'dtype to "bfloat16"'),
    (["bf16.enabled=false", 'torch_autocast={"enabled": true, "dtype": "fp16"}'], "error", None, 'to "bfloat16"'),
    ([zero(stage=3, offload_param={"device": "nvme"})], "error", None, "set zero_optimization.offload_param.nvme_path"),
    (["steps_per_print=0"], "error", "steps_per_print", "is no number of steps"),
    (
        [zero(stage=1, offload_optimizer={"device": "nvme", "pin_memory": False})],
        "warning",
        None,
        "where DeepSpeed has no NVMe",
    ),
    (
        [zero(stage=2, overlap_comm=True, contiguous_gradients=False)],
        "warning",
        "zero_optimization.contiguous_gradients",
        "wait for the device before each bucket",
    ),
    ([*MUON, "optimizer.params.muon_lr=0.5"], "warning", "optimizer.params.muon_lr", "a rate that suits AdamW"),
    ([*MUON, "optimizer.params.lr=0.09"], "warning", "optimizer.params.lr", "divide it by that factor"),
    (["data_types.grad_accum_dtype=fp16"], "warning", "data_types.grad_accum_dtype", "fp16's range"),
    (["torch_autocast.enabled=true"], "warning", "torch_autocast.enabled", "in 16 bit already"),
]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([*MUON, zero(stage=2, **OFFLOAD)], "remove zero_optimization.offload_optimizer, or set optimizer.type"),
        ([*MUON, zero(stage=3, offload_param={"device": "cpu"})], "remove zero_optimization.offload_param, or"),
        ([*MUON, *MASTERS, "bf16.bf16_optimizer_states=true"], "momentum loses small gradients"),
        ([*MUON, "optimizer.params.adam_w_mode=false"], "adam_w_mode=False is for type Adam, and type is 'Muon'"),
        ([*MUON, "optimizer.params.torch_adam=true"], "remove optimizer.params.torch_adam"),
        ([*MUON, "optimizer.params.adam_lr=1e-3"], "did you mean 'optimizer.params.lr'"),
        ([*MUON, "optimizer.params.ns_method=gram"], "five iterations; remove it"),
        (["optimizer.params.muon_lr=0.01"], "remove optimizer.params.muon_lr, or set optimizer.type to 'Muon'"),
        (["optimizer.params.momentum=0.9"], "momentum=0.9 is for type Muon, and type is 'AdamW'"),
        (["optimizer.type=muon"], "did you mean 'Muon'"),
    ],
)
def test_muon_with_what_it_cannot_is_refused_with_the_way_out(sound, overrides, complaint):
    (found,) = (issue for issue in lint_file(sound, overrides) if issue.level == "error")
    assert complaint in found.text


@pytest.mark.parametrize(("overrides", "level", "key", "complaint"), MISTAKES, ids=[m[0][-1][:48] for m in MISTAKES])
def test_a_planted_mistake_is_named_with_the_way_out(sound, overrides, level, key, complaint):
    (finding,) = lint_file(sound, overrides)
    assert finding.level == level
    assert complaint in finding.text
    assert finding.key == (key or finding.key)
    assert any(finding.key.split(".")[-1] in override for override in overrides)


SOUND_KEYS = [
    [*MASTERS, "bf16.bf16_optimizer_states=true"],
    [*MASTERS, zero(**OFFLOAD, stage=2)],
    ["bf16.enabled=false", 'torch_autocast={"enabled": true, "dtype": "bfloat16"}'],
    [zero(stage=3, zero_hpz_partition_size=2)],
    [zero(stage=3, zero_quantized_weights=False, compute_grad_norm=True)],
]


@pytest.mark.parametrize("overrides", SOUND_KEYS, ids=[keys[-1][:48] for keys in SOUND_KEYS])
def test_the_same_keys_with_values_that_work_are_no_errors(sound, overrides):
    assert [finding for finding in lint_file(sound, overrides) if finding.level == "error"] == []


@pytest.mark.parametrize(
    "overrides",
    [
        # the gap can be too large from the first evaluation on, at 8,192,000 of 16,384,000 tokens
        ["megagpt.every.eval=1000", f"{STOPPING}.patience_tokens=9000000", f"{STOPPING}.max_gap=0.5"],
        # validation and generation have 64 positions
        ["megagpt.model.sliding_window=48", "megagpt.model.seq_len=64", "megagpt.data.seq_len=32"],
    ],
)
def test_what_has_an_effect_is_no_finding(sound, overrides):
    assert lint_file(sound, overrides) == []


def test_what_is_left_out_and_matters_is_noted(sound):
    run = json.loads(sound.read_text())
    for section, key in ((run, "gradient_clipping"), (run["optimizer"]["params"], "betas"), (run, "bf16")):
        del section[key]
    sound.write_text(json.dumps(run))
    found = lint_file(sound)
    assert {finding.level for finding in found} == {"note"}
    assert [finding.key for finding in found] == ["gradient_clipping", "optimizer.params.betas", "bf16"]


def test_all_mistakes_are_found_at_once(sound):
    overrides = ["gradient_cliping=1", "zero_optimization.stag=2", "megagpt.every.saves=3", "amp.enabled=true"]
    keys = {finding.key for finding in lint_file(sound, overrides)}
    assert keys == {"gradient_cliping", "zero_optimization.stag", "megagpt.every.saves", "amp"}


def test_the_ranks_decide_on_the_batch(sound):
    assert lint_file(sound, ranks=2) == []
    (finding,) = lint_file(sound, ranks=3)
    assert "x 3 ranks = 12; set train_batch_size to 12" in finding.text


def test_the_command_prints_findings_and_the_effective_configuration(sound, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["lint", str(sound), "--json", "--effective"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(issue["level"], issue["key"]) for issue in printed["findings"]] == [("warning", "megagpt.data")]
    assert printed["effective"]["gradient_accumulation_steps"] == 2
    assert printed["effective"]["megagpt"]["keep"] == {"last": 2, "every": 0, "best": 1}
    assert main(["lint", str(sound), "zero_optimization.stag=2"]) == 2
    assert "error: unknown key 'zero_optimization.stag'; did you mean 'zero_opt" in capsys.readouterr().out


def test_training_is_told_the_warnings_and_refuses_all_errors():
    run = parse_run(SOUND, ["vocabulary_size=50257"])
    (warning,) = lint_or_raise(run)
    assert warning.startswith("warning: vocabulary_size=50257 has no effect: the vocabulary is the tokenizer's")
    with pytest.raises(UserError, match=r"unknown key 'bf16\.on'.*; unknown key 'zero_optimization\.stag'"):
        lint_or_raise(parse_run(SOUND, ["zero_optimization.stag=2", "bf16.on=true"]))


def test_the_effective_file_has_what_the_notes_tell_and_is_its_own_effective_file(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    run = load_run_config(tmp_path / "good.json")
    told = [issue.key for issue in lint_file(tmp_path / "good.json") if issue.level == "note"]
    assert {"gradient_clipping", "optimizer.params.betas", "optimizer.params.weight_decay"} <= set(told)
    acting = effective(run, 384)
    assert set(told) <= {key for key, _ in dotted_items(acting)}
    assert (acting["gradient_clipping"], acting["optimizer"]["type"]) == (1.0, "AdamW")
    assert (acting["zero_optimization"]["stage"], acting["bf16"]["enabled"]) == (0, False)
    (tmp_path / "effective.json").write_text(json.dumps(acting))
    assert lint_file(tmp_path / "effective.json") == []
    assert effective(load_run_config(tmp_path / "effective.json"), 384) == acting
    assert run.deepspeed_raw.get("gradient_clipping") is None  # it is not written into the run itself
