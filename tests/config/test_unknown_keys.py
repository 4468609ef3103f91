"""Unknown keys: each is answered by the key that was meant, as it is typed, wherever and however it was given."""

import json
from copy import deepcopy

import pytest
from support import GOOD

from megagpt.__main__ import main
from megagpt.cli.pretrain import pretrain
from megagpt.config.other_trainers import NAMES, NOTES, OUR_KEY, WITHOUT_KEY
from megagpt.config.parsing import dotted_items, leaves
from megagpt.config.run_file import KEYS, parse_run
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file, lint_or_raise

SLIPS = {  # what people type: as here but in another section, and as in nanoGPT and Hugging Face's Trainer
    **dict.fromkeys(["max_steps", "schedule.max_steps", "max_iters"], "megagpt.schedule.max_steps"),
    **dict.fromkeys(["num_train_epochs", "max_epochs"], "megagpt.schedule.max_epochs"),
    **dict.fromkeys(["lr", "learning_rate", "learning-rate", "optimizer.lr"], "optimizer.params.lr"),
    **dict.fromkeys(["dropout", "model.dropout", "hidden_dropout"], "megagpt.regularization.dropout"),
    **dict.fromkeys(["resid_pdrop", "residual_dropout"], "megagpt.regularization.residual_dropout"),
    **dict.fromkeys(["drop_path_rate", "stochastic_depth"], "megagpt.regularization.stochastic_depth"),
    **dict.fromkeys(["n_layer", "model.n_layer", "num_hidden_layers"], "megagpt.model.n_layer"),
    **dict.fromkeys(["block_size", "n_positions", "max_seq_length"], "megagpt.model.seq_len"),
    **dict.fromkeys(["batch_size", "train_batch_sise"], "train_batch_size"),
    **dict.fromkeys(["val_tokens", "data.val_tokens", "eval_iters"], "megagpt.data.val_tokens"),
    **dict.fromkeys(["weight_decay", "params.weight_decay"], "optimizer.params.weight_decay"),
    **dict.fromkeys(["warmup_iters", "warmup_steps"], "megagpt.schedule.warmup_steps"),
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "grad_accum": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "eval_interval": "megagpt.every.eval",
    "output_dir": "megagpt.out_dir",
    "dtype": "bf16.enabled",
}
PLACES = ["", "megagpt.", "optimizer.", "megagpt.model.", "zero_optimization."]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(GOOD))
    return path


@pytest.mark.parametrize("typed", SLIPS)
def test_a_misplaced_key_is_named_once_wherever_it_is_typed(good, typed):
    meant = f"did you mean '{SLIPS[typed]}'?"
    for place in PLACES:
        if f"{place}{typed}" in KEYS:
            continue
        [issue] = [issue for issue in lint_file(good, [f"{place}{typed}=1"]) if issue.level == "error"]
        assert meant in issue.text
        with pytest.raises(UserError) as caught:
            lint_or_raise(parse_run(GOOD, [f"{place}{typed}=1"]))
        assert str(caught.value).count("did you mean") == 1
        assert meant in str(caught.value)


@pytest.mark.parametrize("key", ["optimizer.params.lr", "megagpt.schedule.max_steps", "megagpt.out_dir"])
def test_a_required_key_that_is_written_elsewhere_is_one_error(good, key):
    """It is missing where it belongs, but that follows from the first."""
    *sections, name = key.split(".")
    raw = deepcopy(GOOD)
    section = raw
    for part in sections:
        section = section[part]
    raw[name] = section.pop(name)
    good.write_text(json.dumps(raw))
    [issue] = lint_file(good)
    assert issue.text == f"unknown key '{name}'; did you mean '{key}'?"


@pytest.mark.parametrize("typed", [typed for typed in SLIPS if typed != "train_batch_sise"])
@pytest.mark.parametrize("words", [["--{}=7"], ["--{}", "7"]], ids=["one word", "two words"])
def test_a_key_that_is_typed_as_an_option_is_answered_by_the_words_to_type(good, capsys, typed, words):
    given = [word.format(typed) for word in words]
    assert main(["lint", str(good), *given]) == 2
    of_lint = capsys.readouterr().err
    assert pretrain(["--deepspeed_config", str(good), *given]) == 2
    assert capsys.readouterr().err == of_lint
    value = "VALUE" if {typed, SLIPS[typed]} & NOTES.keys() and typed in OUR_KEY else "7"
    assert f"error: there is no option --{typed}; keys of the run file are typed without dashes: " in of_lint
    assert f"{SLIPS[typed]}={value}" in of_lint
    assert of_lint.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["plan", "FILE", "--rnaks", "4"], "no option --rnaks; did you mean --ranks?"),
        (["generate", "x", "--max_tokens", "4"], "no option --max_tokens; did you mean --max-tokens?"),
        (["generate", "x", "y"], "there is nothing to do with 'y'; see `megagpt generate --help`"),
        (
            ["lint", "FILE", "--vocab_size=7"],
            "no option --vocab_size: the vocabulary is that of the dataset's tokenizer",
        ),
        (["generate", "x", "--max_new_tokens=4"], "no option --max_new_tokens; did you mean --max-tokens?"),
        (["generate", "x", "-p", "def "], "no option -p; did you mean --prompt?"),
        (["lint", "FILE", "--bf16"], "typed without dashes: bf16.enabled=true\n"),
        (["lint", "FILE", "--fp16", "False"], "typed without dashes: fp16.enabled=false\n"),
        (["lint", "FILE", "--mlflow"], "typed without dashes: megagpt.mlflow.enabled=true\n"),
        (["lint", "FILE", "--optimizer", "adamw"], "typed without dashes: optimizer.KEY=adamw\n"),
        (["lint", "FILE", "--zzz"], "no option --zzz; see `megagpt lint --help`"),
    ],
)
def test_an_option_that_there_is_none_of_is_one_line(good, capsys, typed, answer):
    assert main([str(good) if word == "FILE" else word for word in typed]) == 2
    said = capsys.readouterr().err
    assert answer in said
    assert said.count("\n") == 1


def test_names_of_other_trainers_lead_to_keys_that_there_are():
    known = KEYS | {"wandb.enabled", "wandb.project"}  # which DeepSpeed's own models know
    assert set(NAMES) <= known
    assert {key for key in NOTES if "." in key} <= known
    own = {key for key, value in dotted_items(GOOD)} | {key.rpartition(".")[2] for key in leaves(GOOD)}
    assert not own & (OUR_KEY.keys() | WITHOUT_KEY.keys())


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("bf16=true", "bf16.enabled=true"),
        ("flops_profiler=true", "flops_profiler.enabled=true"),
        ("zero_optimization=2", "zero_optimization.stage=2"),
        ('optimizer="Adam"', 'optimizer.type="Adam"'),
        ("megagpt.early_stopping=5", "megagpt.early_stopping.patience=5"),
        ("megagpt.packing=best-fit", 'megagpt.packing.kind="best-fit"'),
        ("megagpt.recompute=full", 'megagpt.recompute.policy="full"'),
    ],
)
def test_a_value_in_the_place_of_a_section_is_answered_by_its_key(good, override, way_out):
    key, _, value = way_out.partition("=")
    [issue] = [issue for issue in lint_file(good, [override]) if issue.level == "error"]
    assert issue.text.endswith(f" is not a section {{...}}; set {key} to {value}")
    with pytest.raises(UserError) as caught:
        lint_or_raise(parse_run(GOOD, [override]))
    assert issue.text in str(caught.value)
    parse_run(GOOD, [way_out])
