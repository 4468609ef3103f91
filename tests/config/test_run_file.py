import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DEBUG_RUN, GOOD, ROOT, RUN_FILES

from megagpt.__main__ import main
from megagpt.config.batch import batch_plan
from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.deepspeed_keys import DEEPSPEED_KEYS, DEEPSPEED_SECTIONS, REFUSED_KEYS
from megagpt.config.run_file import load_run_config, parse_run, run_schema
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_shipped_run_file_loads_and_its_batches_multiply_out(path):
    run = load_run_config(path)
    plan = batch_plan(run.deepspeed, 1)
    assert plan.global_batch == plan.micro_batch * plan.accumulation
    assert run.megagpt.out_dir.parts[0] == "runs"


def test_every_run_file_has_a_row_in_the_readme():
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    assert [path.name for path in RUN_FILES if f"`{path.name}`" not in readme] == []


def test_every_key_of_the_schema_is_described():
    schema = run_schema()
    models = [schema, schema["properties"]["megagpt"], *schema["$defs"].values()]
    keys = [(key, value) for model in models for key, value in model["properties"].items()]
    assert len(keys) > 120
    assert [key for key, value in keys if not value.get("description")] == []
    assert set(schema["properties"]) >= DEEPSPEED_KEYS


def test_the_committed_schema_is_the_codes():
    """After a change: `make schema`."""
    assert json.loads((ROOT / "ds_configs" / "run.schema.json").read_text()) == run_schema()


def test_our_section_is_split_off_and_the_rest_is_as_written():
    run = parse_run({**GOOD, "zero_optimization": {"stage": 1, "overlap_comm": True}})
    assert run.megagpt.model.n_layer == 2
    assert run.deepspeed_raw["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert "megagpt" not in run.deepspeed_raw


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["gradient_cliping=1.0"], "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        (["megagpt.model.n_layers=3"], "unknown key 'megagpt.model.n_layers'; did you mean 'megagpt.model.n_layer'?"),
        (["megagpt.early_stoping.patience=3"], "did you mean 'megagpt.early_stopping.patience'?"),
        (
            ["megagpt.data.train.0.wieght=3"],
            "did you mean 'megagpt.data.train.0.weight'?",
        ),
        (["optimizer.params.learning_rate=1"], "optimizer.params.learning_rate'"),
        (
            ["activation_checkpointing.partitioned_activations=true"],
            "'activation_checkpointing.partition_activations'?",
        ),
        (
            ["megagpt.model.n_embd=770", "megagpt.model.n_head=12"],
            "n_embd=770 is not a multiple of megagpt.model.n_head=12",
        ),
        (["megagpt.schedule.max_steps=0"], "megagpt.schedule.max_steps=0"),
        (["megagpt.schedule.shape=cosin"], "megagpt.schedule.shape='cosin'"),
        (["megagpt.schedule.decay_steps=3"], "megagpt.schedule.decay_steps=3 with megagpt.schedule.shape='cosine'"),
        (
            ["megagpt.schedule.warmup_steps=9"],
            "exceed megagpt.schedule.max_steps=5, the last step; set megagpt.schedule.warmup_steps=0",
        ),
        (["megagpt.recompute.policy=every_k"], "megagpt.recompute.k=null with megagpt.recompute.policy='every_k'"),
        (["megagpt.recompute.k=2"], "megagpt.recompute.k=2 with megagpt.recompute.policy='none'"),
        (["megagpt.recompute.policy=budget"], "megagpt.recompute.budget=null with megagpt.recompute.policy='budget'"),
        (["megagpt.recompute.budget=0.5"], "megagpt.recompute.budget=0.5 with megagpt.recompute.policy='none'"),
        (['megagpt.recompute={"policy": "selective", "kind": "deepspeed"}'], "DeepSpeed recomputes whole blocks"),
        (['megagpt.recompute={"policy": "selective", "offload": true}'], "whose kept tensors stay on the device"),
        (['megagpt.recompute={"policy": "full", "kind": "deepspeed", "offload": true}'], "cpu_checkpointing"),
        (["megagpt.regularization.dropout=1.5"], "megagpt.regularization.dropout=1.5"),
        (["train_batch_size=auto"], 'train_batch_size is "auto"'),
        (["zero_optimization.reduce_bucket_size=auto"], 'zero_optimization.reduce_bucket_size is "auto"'),
        (["scheduler.type=WarmupLR"], "'scheduler' is not supported: the learning rate comes from megagpt.schedule"),
        (
            ["flops_profiler.enabeld=true"],
            "'flops_profiler.enabeld'; did you mean 'flops_profiler.enabled'?",
        ),
        (["data_types.grad_acum_dtype=fp32"], "did you mean 'data_types.grad_accum_dtype'?"),
        (["timers=3"], "timers=3 is not a section"),
        (["checkpoint.writer.decoupled=true"], "'checkpoint' is not supported: megagpt commits checkpoints itself"),
        (["zero_optimization.offload_param.device=cpu"], "offload_param has no effect at zero_optimization.stage=0"),
        (["pipeline.stages=2"], "'pipeline' is not supported"),
        (["megagpt.schedule.max_steps"], "not of the form key.path=value"),
        (["megagpt.data.train.7.path=x"], "there is no 'megagpt.data.train.7.path' to set"),
        (["megagpt.schedule.max_steps.x=1"], "there is no 'megagpt.schedule.max_steps.x' to set"),
        (["zero_optimization.stage=4"], "zero_optimization.stage=4"),
        (["bf16=true"], "bf16=true is not a section {...}"),
        (["megagpt.data.val=null"], "megagpt.data.val=null is not a path"),
        (["megagpt.data.train=data/corpus"], "megagpt.data.train='data/corpus' is not a list [...]"),
        (
            ['megagpt.data.train=[{"path": "x", "wieght": 1}]'],
            "did you mean 'megagpt.data.train.0.weight'?",
        ),
        (["megagpt.out_dir=3"], "megagpt.out_dir=3 is not a path"),
        (["megagpt.model.seq_len=64", "megagpt.data.seq_len=65"], "data.seq_len=65 is more than the model's positions"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(overrides, complaint):
    with pytest.raises(UserError) as caught:
        parse_run(GOOD, overrides)
    assert complaint in str(caught.value)


def test_a_missing_section_and_a_missing_key_are_named():
    with pytest.raises(UserError, match='no "megagpt" section'):
        parse_run({key: value for key, value in GOOD.items() if key != "megagpt"})
    with pytest.raises(UserError, match="train_batch_size is missing"):
        parse_run({key: value for key, value in GOOD.items() if key != "train_batch_size"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1,\n "a": 2}', "'a' twice"),
        ('{"a": 1,\n "b" 2}', "line 2, column 6: not JSON"),
        ("[]", "holds a JSON list"),
        ("\xff", "cannot be read|not JSON"),
        ("", "not JSON"),
        ("[" * 10**5, "nested too deep"),
    ],
)
def test_a_file_that_is_no_run_file_is_one_message(tmp_path, text, complaint):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=complaint):
        load_run_config(path)


def test_a_run_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        load_run_config(tmp_path / "nothing.json")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4), st.data())
def test_any_value_anywhere_is_accepted_or_one_message(value, data):
    keys = ["train_batch_size", "optimizer", "bf16.enabled", "megagpt.model", "megagpt.data.train", "megagpt.every.log"]
    override = f"{data.draw(st.sampled_from(keys))}={json.dumps(value)}"
    with contextlib.suppress(UserError):  # anything else is a traceback that a user would see
        parse_run(GOOD, [override])


def test_overrides_are_json_or_text():
    run = parse_run(GOOD, ["megagpt.out_dir=runs/y", "megagpt.every.log=3", 'megagpt.sample={"prompts": ["a=b"]}'])
    assert str(run.megagpt.out_dir) == "runs/y"
    assert run.megagpt.every.log == 3
    assert run.megagpt.sample.prompts == ("a=b",)


def test_a_run_file_written_out_again_is_the_same_run():
    run = load_run_config(DEBUG_RUN)
    again = parse_run(run.as_json())
    assert (again.megagpt, again.deepspeed) == (run.megagpt, run.deepspeed)


def test_the_list_of_deepspeeds_keys_is_the_installed_deepspeeds(device):
    """DeepSpeed says nothing about a key it does not know, so record which ones it asks for."""
    import deepspeed
    from deepspeed.runtime import config as ds

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # as build.py does, before it is first read
    deepspeed.init_distributed(verbose=False)  # without ranks it does not ask for sequence_parallel_size

    class Recorder(dict):
        def __init__(self, **content):
            super().__init__(**content)
            self.asked = set()

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            self.asked.add(key)
            return super().__contains__(key)

        def __getitem__(self, key):
            self.asked.add(key)
            return super().__getitem__(key)

        def keys(self):
            return self

    sections = {name: Recorder(enabled=False) for name in DEEPSPEED_SECTIONS}
    whole = Recorder(train_batch_size=4, optimizer={"type": "AdamW"}, **sections)
    ds.DeepSpeedConfig(whole)
    assert {name: section.asked for name, section in sections.items()} == DEEPSPEED_SECTIONS
    asked = whole.asked
    assert asked - set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) - set(REFUSED_KEYS) == DEEPSPEED_KEYS


def ds_config(total: int, micro: int, accumulation: int | None = None, *, sharing: int = 1) -> DeepSpeedConfig:
    return DeepSpeedConfig(
        sequence_parallel_size=sharing,
        train_batch_size=total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        optimizer={"params": {"lr": 1.0}},
    )


def test_accumulation_follows_from_the_global_batch():
    assert batch_plan(ds_config(512, 16), world_size=8).accumulation == 4


def test_batch_sizes_that_do_not_multiply_out_name_the_number_to_set():
    with pytest.raises(
        UserError, match=r"train_batch_size=500 is not .*16 x 8 ranks = 128; set train_batch_size to 512"
    ):
        batch_plan(ds_config(500, 16), world_size=8)
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=3 x 8 ranks = 384; set gradient_acc.* to 4"):
        batch_plan(ds_config(512, 16, 3), world_size=8)


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 64),
    st.none() | st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
)
def test_each_number_to_set_is_right(total, micro, ranks, accumulation, sharing):
    """One message is about the ranks that share samples, and the batch is the next one's."""
    given = {"total": total, "micro": micro, "accumulation": accumulation, "sharing": sharing}
    try:
        batch_plan(ds_config(**given), ranks)
    except UserError as error:
        advice = re.findall(r"(?:set|or|start) (?:(\w+) to )?(\d+)", str(error))
        assert advice
        for key, number in advice:
            name = {"": "ranks"} | dict(zip(BATCH_KEYS, given, strict=True))
            changed = {**given, "ranks": ranks, name[key]: int(number)}
            now_ranks = changed.pop("ranks")
            if key == "sequence_parallel_size":
                assert now_ranks % changed["sharing"] == 0
            else:
                plan = batch_plan(ds_config(**changed), now_ranks)
                assert plan.micro_batch * plan.accumulation * plan.replicas == plan.global_batch


BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "sequence_parallel_size",
)


@pytest.mark.parametrize(
    ("command", "way"),
    [
        ("slurm FILE --dry-run", "--gpus-per-node 2"),
        ("slurm FILE --dry-run --nodes 64 --gpus-per-node 1", "--nodes 2"),
        ("slurm FILE --dry-run --nodes 3 train_batch_size=16", "--nodes 1 --gpus-per-node 4"),
        ("plan FILE --ranks 8", "--ranks 2"),
        ("lint FILE --ranks 1000000", "--ranks 2"),
        ("verify-resume FILE --ranks 5", "--ranks 2"),
        ("verify-resume FILE --then-ranks 5", "--then-ranks 2"),
    ],
)
def test_every_command_that_divides_the_batch_names_the_option_that_helps(tmp_path, capsys, command, way):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    words = [str(tmp_path / "run.json") if word == "FILE" else word for word in command.split()]
    assert main(words) == 2
    said = "".join(capsys.readouterr())
    assert said.endswith(f", or give {way}\n")
    if words[0] != "verify-resume":  # which trains
        assert main([*words, *way.split()]) == 0


def test_ranks_that_share_samples_count_as_one():
    plan = batch_plan(ds_config(512, 16, sharing=4), world_size=8)
    assert (plan.world_size, plan.replicas, plan.accumulation) == (8, 2, 16)
    with pytest.raises(UserError, match=r"16 x 2 groups of 4 ranks \(seq.*\) = 32; set train_batch_size to 512"):
        batch_plan(ds_config(500, 16, sharing=4), world_size=8)
    with pytest.raises(
        UserError, match=r"sequence_parallel_size=4 does not divide the number of ranks, 6; set seq.* to 2"
    ):
        batch_plan(ds_config(512, 16, sharing=4), world_size=6)


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [("model.n_head", 6, 2), ("model.seq_len", 62, 2), ("data.seq_len", 18, 2), ("data.seq_len", 3, 1)],
)
def test_heads_and_positions_are_shared_evenly(key, value, way_out):
    heads = ["megagpt.model.n_embd=48", "megagpt.model.n_head=8", "megagpt.model.seq_len=64"]
    with pytest.raises(
        UserError,
        match=rf"size=4 does not divide megagpt.{key}={value}, .* set sequence_parallel_size to {way_out}, or",
    ):
        parse_run(GOOD, [*heads, "sequence_parallel_size=4", f"megagpt.{key}={value}"])


QUOTED = [
    *('optimizer.params.lr="1e-3"', 'megagpt.schedule.max_steps="200"', 'megagpt.every.log="5"'),
    *('optimizer.params.betas=["0.9","0.95"]', 'zero_optimization.stage="1"', 'fp16.loss_scale="0"'),
    *('megagpt.compile="true"', 'bf16.enabled="true"', 'aio.block_size="1"', 'megagpt.data.val_tokens="8"'),
]


@pytest.mark.parametrize("item", QUOTED)
def test_a_number_in_quotes_is_refused_by_lint_and_without_quotes_it_is_taken(tmp_path, item):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    [issue] = [issue for issue in lint_file(tmp_path / "run.json", [item]) if issue.level == "error"]
    key, _, text = item.partition("=")
    assert issue.text.startswith(f"{key}=")
    assert issue.text.endswith(" is in quotes; write it without them")
    assert not [
        issue
        for issue in lint_file(tmp_path / "run.json", [f"{key}={text.replace(chr(34), '')}"])
        if "quotes" in issue.text
    ]


def test_numbers_that_json_lacks_are_read_on_a_command_line():
    run = parse_run(GOOD, ["optimizer.params.lr=.5", "megagpt.regularization.z_loss=1.", "megagpt.compile=False"])
    assert run.deepspeed.optimizer.params.lr == run.deepspeed_raw["optimizer"]["params"]["lr"] == 0.5
    assert (run.megagpt.regularization.z_loss, run.megagpt.compile) == (1.0, False)
    assert parse_run(GOOD, ["tensorboard.job_name=007"]).deepspeed.tensorboard.job_name == "007"


def test_auto_is_answered_by_lint_as_by_training(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    for key in ("train_micro_batch_size_per_gpu", "gradient_clipping", "bf16.enabled", "optimizer.params.lr"):
        [issue] = lint_file(tmp_path / "run.json", [f"{key}=auto"])
        with pytest.raises(UserError) as caught:
            parse_run(GOOD, [f"{key}=auto"])
        assert str(caught.value) == f"run file: {issue.text}"
        value = "true or false" if key.endswith("enabled") else "the number"
        assert issue.text.startswith(f'{key} is "auto"; write {value}, ')
        assert issue.text.endswith("or remove the key for its default") == (
            key in ("gradient_clipping", "bf16.enabled")
        )
