"""`megagpt export`: transformers loads the same model and tokens, and nothing is left of an export that fails."""

import json
import re
import stat
from pathlib import Path

import pytest
import torch
from data_support import document, lossy_tokenizer, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support import debug_run

from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.config.model import ModelConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.errors import UserError
from megagpt.huggingface import export as exporting
from megagpt.huggingface.export import ODD, equally_likely, export
from megagpt.huggingface.fast_tokenizer import fast_tokenizer
from megagpt.huggingface.weights import config_json, renamed, write_weights
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train.trainer import train

KINDS = ["unigram", "bpe", "char"]


@pytest.fixture(scope="module")
def run(dataset, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    few = ["megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0", "megagpt.every.eval=2"]
    train(debug_run(dataset, folder, *few), device)
    return folder


@pytest.mark.process
def test_transformers_loads_the_export(run, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "a b"), "--dtype", "bf16", "--license", "mit"]) == 0
    assert "10,000 of 10,000 lines have the same token ids" in capsys.readouterr().out
    model, tokenizer, *_ = load_model(run, torch.device("cpu"))
    tensors = load_file(tmp_path / "a b" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert len(tensors["transformer.wte.weight"]) == tokenizer.vocab_size < len(model.wte.weight)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    card = (tmp_path / "a b" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "Converted from SentencePiece and compared on 10,000 lines" in card
    published = json.loads((tmp_path / "a b" / "megagpt_run.json").read_text())
    assert published["megagpt"]["model"]["n_layer"] == 2
    assert not {"wandb", "tensorboard", "mlflow"} & {*published, *published["megagpt"]}
    assert "| loss | " in card
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    card = card.replace('"a b"', '"./a b"')  # else it may be a name of the hub
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1])
    # the end of the document before stands first, as in training, and is one token
    example = capsys.readouterr().out
    assert example.startswith(f"{tokenizer.names()[tokenizer.eod_id]}The ")
    assert (tmp_path / "a b" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in (tmp_path / "a b").iterdir()} == {0o444}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b"]


@pytest.mark.process
def test_nothing_is_left_of_an_export_that_is_another_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LINES", 10)
    monkeypatch.setattr(exporting, "renamed", lambda *args: renamed(*args) | {"transformer.ln_f.bias": torch.ones(64)})
    with pytest.raises(UserError, match="a logit differs by"):
        export(load_model(run, torch.device("cpu")), tmp_path / "out", dtype="fp32", license_name=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda out: out.write_text("mine"), "is no folder"),
        (lambda out: (out.mkdir(), (out / "mine").touch()), "is not empty, and nothing in it is overwritten"),
        (lambda out: out.symlink_to("elsewhere"), "is no folder"),
    ],
)
def test_what_is_there_is_not_overwritten(run, tmp_path, capsys, made, complaint):
    made(tmp_path / "out")
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "more", "complaint"),
    [
        (".", [], "is the current folder, which cannot be replaced"),
        ("new", ["--license", "mit\ntags: x"], "is no name of a license"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(run, tmp_path, monkeypatch, capsys, out, more, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), out, *more]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_error_is_one_message(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", str(run), str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_several_files_hold_what_one_does(run, tmp_path):
    model = load_model(run, torch.device("cpu")).model
    weights = renamed(model.state_dict(), model.cfg, 300)
    write_weights(weights, tmp_path, torch.float32, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as tensors:
            assert torch.equal(tensors.get_tensor(name), weights[name])


def test_matrices_are_transposed_and_the_padding_is_gone(run):
    model = load_model(run, torch.device("cpu")).model
    weights = renamed(model.state_dict(), model.cfg, 300)
    assert torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.T)
    assert torch.equal(weights["transformer.wte.weight"], model.wte.weight[:300])
    assert len(weights) == len(model.state_dict()) - 1


@pytest.mark.parametrize(
    ("seq_len", "vocab_size", "n_embd", "n_head"),
    [(8, 1, 16, 1), (64, 257, 48, 3), (129, 1000, 64, 8), (32, 50_257, 32, 2), (2048, 383, 32, 1)],
)
def test_logits_are_those_of_transformers_for_every_shape(seq_len, vocab_size, n_embd, n_head):
    """Without a file between them: the mapping of names and the configuration alone, over the whole context."""
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = ModelConfig(n_layer=2, n_head=n_head, n_embd=n_embd, seq_len=seq_len)
    torch.manual_seed(0)
    model = GPT(cfg, -(-vocab_size // 128) * 128).eval()
    for weight in model.parameters():  # biases and LayerNorms that are 0 and 1 would hide an exchange
        torch.nn.init.normal_(weight, std=0.2)
    config = GPT2Config(**config_json(cfg, vocab_size, 0, NO_DROPOUT, "fp32"))
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(renamed(model.state_dict(), model.cfg, vocab_size), strict=False)
    tokens = torch.randint(vocab_size, (1, seq_len))
    with torch.no_grad():
        ours, expected = model(tokens)[..., :vocab_size], theirs(tokens).logits
    assert ours.shape == expected.shape
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * max(10.0, expected.abs().max().item()))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return small_tokenizer(request.param)


@given(st.data())
def test_the_fast_tokenizer_gives_the_same_ids(tokenizer, data):
    """Of any text; a unigram model's ties may be cut in another way."""
    pieces = st.sampled_from([*ODD, *(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))])
    text = "".join(data.draw(st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=30)))
    fast = fast_tokenizer(tokenizer)
    ours, theirs = tokenizer.encode(text).tolist(), fast.encode(text, add_special_tokens=False).ids
    assert ours == theirs or equally_likely(tokenizer, ours, theirs)
    assert fast.decode(theirs, skip_special_tokens=False) == text


def test_the_fast_tokenizer_gives_the_same_ids_for_documents(tokenizer):
    texts = [document(seed, 500) for seed in range(50)]
    found = fast_tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, found, strict=True):
        ours = tokenizer.encode(text).tolist()
        assert ours == encoding.ids or equally_likely(tokenizer, ours, encoding.ids)


def test_a_tokenizer_that_normalizes_is_refused():
    with pytest.raises(UserError, match=r"normalizes text \(nmt_nfkc\)"):
        fast_tokenizer(lossy_tokenizer())


def test_only_ties_are_equally_likely():
    tokenizer = small_tokenizer("unigram")
    ids = tokenizer.encode("the cat").tolist()
    assert equally_likely(tokenizer, ids, ids)
    assert not equally_likely(tokenizer, ids, tokenizer.encode("the cats").tolist())
    spelled = [i for letter in "the cat" for i in tokenizer.encode(letter).tolist()]
    assert tokenizer.decode(spelled) == "the cat"
    assert spelled != ids
    assert not equally_likely(tokenizer, ids, spelled)
