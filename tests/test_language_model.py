"""`megagpt.load`: it gives the numbers and texts of the commands, and each mistake is one message."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, debug_run

import megagpt
from megagpt.__main__ import main
from megagpt.checkpoint.commit import best, committed
from megagpt.data.dataset import open_dataset
from megagpt.errors import UserError
from megagpt.language_model import LanguageModel
from megagpt.train.trainer import train

T = 64  # the debug run's seq_len
TEXT = "abcdef ghi\n"


@pytest.fixture(scope="module")
def run(dataset, device, tmp_path_factory) -> Path:
    """Steps 2 and 4 of a run with attention within documents: the first is the best."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    keys = ["schedule.max_steps=4", "schedule.warmup_steps=0", "every.save=2", "every.eval=2"]
    more = [f"megagpt.{key}" for key in (*keys, "packing.kind=concatenate-masked", "early_stopping.min_delta=100")]
    train(debug_run(dataset, folder, *more), device)
    return folder


@pytest.fixture(scope="module")
def model(run) -> LanguageModel:
    return megagpt.load(run, device="cpu")


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_the_examples_of_the_documentation_work(run, tmp_path, monkeypatch, capsys, page):
    [block] = re.findall(r"```python\n(import megagpt\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    for name in ("mine", "gpt2_124m"):
        (tmp_path / "runs" / name).symlink_to(run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    if page == "README.md":
        assert capsys.readouterr().out.startswith("The ")
        assert names["probabilities"].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0, "seed": 3}, {"top_k": 3, "top_p": 0.9, "seed": -1}])
def test_it_generates_what_the_command_prints(run, model, capsys, options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "abc", "--max-tokens", "70", *flags]) == 0
    assert model.generate("abc", max_tokens=70, **options) + "\n" == capsys.readouterr().out


def test_it_scores_as_the_command_evaluates(run, model, dataset, capsys):
    """Of the same ids; several documents are in a window, and attention does not cross them."""
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(dataset), "--tokens", str(40 * T), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    ids = np.empty(40 * T + 1, np.uint16)
    open_dataset(dataset).stream("val").copy(0, ids)
    found = model.score(ids)
    assert (found.tokens, found.bytes) == (row["tokens"], row["bytes"]) == (40 * T, found.bytes)
    assert found.loss == pytest.approx(row["loss"], rel=1e-6)
    assert found.bits_per_byte == pytest.approx(row["bits_per_byte"], rel=1e-6)


def test_a_text_is_the_document_of_its_ids_and_a_long_one_the_sum_of_its_windows(model):
    ids = [model.tokenizer.eod_id, *model.tokenizer.encode(TEXT * 10).tolist()]
    assert len(ids) == 111
    whole, first, second = model.score(ids), model.score(ids[: T + 1]), model.score(torch.tensor(ids[T:]))
    assert whole == model.score(TEXT * 10)
    assert (whole.tokens, whole.bytes) == (first.tokens + second.tokens, 110)
    assert whole.loss * 110 == pytest.approx(first.loss * first.tokens + second.loss * second.tokens)


def test_logits_are_those_that_score_and_generate_use(model):
    ids = [model.tokenizer.eod_id, *model.tokenizer.encode(TEXT).tolist()]
    logits = model.logits(TEXT)
    assert (logits.shape, logits.dtype) == ((len(TEXT) + 1, model.tokenizer.vocab_size), torch.float32)
    assert torch.equal(logits, model.logits(ids))
    assert torch.allclose(logits[:1], model.logits(""), atol=1e-6)
    following = model.tokenizer.decode([int(logits[-1].argmax())])
    assert model.generate(TEXT, max_tokens=1, temperature=0.0) == TEXT + following
    # The score's softmax is over the padded vocabulary, as in training.
    with torch.no_grad():
        padded = model.model(torch.tensor([ids]))[0, :-1]
    assert torch.equal(padded[:, : logits.size(1)], logits[:-1])
    nats = torch.nn.functional.cross_entropy(padded, torch.tensor(ids[1:]))
    assert model.score(TEXT).loss == pytest.approx(nats.item(), rel=1e-6)


def test_every_way_to_name_a_step(run, model):
    older, newest = committed(run)
    assert best(run) == older
    steps = run / "checkpoints"
    named = {run: older, steps: older, steps / "best": older, run / "best": older, steps / "latest": newest}
    named |= {newest: newest, str(run / "latest"): newest, f"{newest}/": newest}
    assert {path: megagpt.load(path).step_dir for path in named} == named
    assert model.step_dir == older
    assert str(older) in repr(model)


def test_loading_draws_nothing_from_the_callers_generator_and_16_bits_are_close(run, model):
    before = torch.get_rng_state()
    for dtype in ("bf16", "float16", torch.bfloat16):
        other = megagpt.load(str(run), dtype=dtype)
        assert other.logits(TEXT).dtype == torch.float32
        assert other.model.wte.weight.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
        assert other.score(TEXT).loss == pytest.approx(model.score(TEXT).loss, rel=0.02)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_is_no_run_is_named_with_what_there_is(run, dataset, tmp_path):
    steps = run / "checkpoints"
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    for path, message in {
        tmp_path / "exported": "exported is a Hugging Face folder; make one that megagpt reads by: megagpt import",
        tmp_path / "nowhere": f"{tmp_path}/nowhere does not exist; give a run's folder, one of its checkpoints/step_*",
        run.with_name(f"{run.name}e"): f"{run}e does not exist; did you mean {run}\\?$",
        run.with_name(f"{run.name}e") / "latest": f"did you mean {run}/latest\\?$",
        run.parent.with_name(f"{run.parent.name}e") / run.name: f"did you mean {run}\\?$",
        run.with_name(f"{run.name}e") / "checkpoints" / "latest": f"did you mean {run}/checkpoints/latest\\?$",
        tmp_path: f"{tmp_path} holds no committed checkpoint; give a run's folder",
        dataset: f"{dataset} is a dataset; give a run's folder",
        steps / "step_00000003": "does not exist; .* has the steps step_00000002, step_00000004$",
        run / "run.json": "run.json is a file, perhaps a run file; give the folder of its run",
        "s3://bucket/run": "is a URL",
        "x" * 300: "cannot be used: File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            megagpt.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, r"device='cuda' cannot be used \(.*\); give device=\"cpu\""),
        ({"device": "cuda:99"}, r"device='cuda:99' cannot be used"),
        ({"device": "gpu"}, r"device='gpu' cannot be used"),
        ({"device": "meta"}, r"device='meta' cannot be used"),
        ({"dtype": "int8"}, "dtype='int8' is none of fp32, bf16, fp16"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is none of"),
    ],
)
def test_a_device_that_is_not_there_and_an_unknown_dtype_are_refused(run, options, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message):
        megagpt.load(run, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to score"),
        ([7], "nothing to score"),
        ([], r"have shape \(0,\)"),
        ([[1, 2]], r"have shape \(1, 2\)"),
        ([1.0, 2.0], "are torch.float64; give whole numbers"),
        ([True, False], "are torch.bool"),
        ([1, -3], "token id -3 is none of the model's, which are 0 to 383"),
        ([1, 10**6], "token id 1000000 is none"),
        ([1, 10**30], "is neither text, a str, nor a sequence of token ids"),
        (b"abc", "is neither text"),
        (["abc"], "is neither text"),
        (None, "is neither text"),
        ("ab\ud800", "lone surrogate at character 2"),
    ],
)
def test_what_is_no_text_is_refused(model, text, message):
    with pytest.raises(UserError, match=message):
        model.score(text)
    if "nothing" not in message:
        with pytest.raises(UserError, match=message):
            model.logits(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": b"abc"}, "prompt=b'abc' is a bytes; give text, a str"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": "all"}, "top_p='all' is not a number"),
        ({"seed": 10**30}, "seed=1000"),
        ({"seed": None}, "seed=None"),
        ({"seed": True}, "seed=True is no whole number"),
    ],
)
def test_a_wrong_option_of_generate_is_named(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(**({"max_tokens": 2} | options))


def test_text_longer_than_the_models_positions(run, model, capsys):
    with pytest.raises(UserError, match=r"the text is 78 tokens, .* and the model has 64 positions; .*`score`"):
        model.logits(TEXT * 7)
    assert model.logits([5] * T).shape[0] == T
    with pytest.warns(UserWarning, match=r"is 77 tokens, and the model has 64 positions: it reads the end"):
        assert model.generate(TEXT * 7, max_tokens=1).startswith(TEXT * 7)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", TEXT * 7, "--max-tokens", "1"]) == 0
    assert "warning: the prompt 'abcdef ghi" in capsys.readouterr().err


def test_output_that_is_not_finite_is_no_number(model, run):
    """In fp16, where nothing of the files shows it."""
    small = megagpt.load(run, dtype="fp16")
    with torch.no_grad():
        small.model.ln_f.weight.fill_(60000.0)
    for ask in (small.logits, small.score, lambda text: small.generate(text, max_tokens=1)):
        with pytest.raises(UserError, match="not finite"):
            ask(TEXT)


@pytest.mark.long
@pytest.mark.process
def test_a_users_program_is_typed(tmp_path):
    from mypy import api

    program = tmp_path / "program.py"
    program.write_text('import megagpt\nreveal_type(megagpt.load("x").score("y").bits_per_byte)\nmegagpt.load(3)\n')
    out, _, _ = api.run([str(program), "--cache-dir", str(tmp_path)])
    assert 'Revealed type is "float"' in out.replace("builtins.", "")
    assert 'Argument 1 to "load" has incompatible type "int"' in out
    assert "2 errors" not in out
