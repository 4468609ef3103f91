"""`megagpt import`: the weights, tokens and logits of transformers, from folders of all times; the rest is refused."""

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from data_support import small_tokenizer
from models_of_others import SIZES, changed_config, changed_tensors, cut, gpt2, write_gpt2, write_tokenizer
from safetensors.torch import load_file, save_file
from support import debug_run
from tokenizers_of_others import of_the_package

from megagpt import load
from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.errors import UserError
from megagpt.huggingface.card import model_card, write_curves
from megagpt.huggingface.import_folder import padded
from megagpt.huggingface.weights import renamed, write_weights
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train.trainer import train

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "small"
    write_gpt2(folder)
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    """A folder to be changed."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def imported(folder: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(["import", str(folder), str(out), *more]) == 0
    model = load_model(out, CPU).model
    return renamed(model.state_dict(), model.cfg, SIZES["vocab_size"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_positions": 8},
        {"n_positions": 2048, "n_layer": 1},
        {"n_embd": 35, "n_head": 5, "n_layer": 3, "vocab_size": 331},
        {"n_embd": 24, "n_head": 1, "vocab_size": 384, "activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False, "n_inner": 100, "vocab_size": 300 + 30},
        {"vocab_size": 500, "n_inner": 128, "layer_norm_epsilon": 1e-2, "reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, capsys, sizes):
    theirs = write_gpt2(tmp_path / "theirs", **sizes)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    left_out = theirs.config.vocab_size - 384
    assert ("left out" in capsys.readouterr().out) == (left_out > 0)
    tokens = torch.randint(
        SIZES["vocab_size"], (theirs.config.n_positions,), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = theirs(input_ids=tokens.unsqueeze(0)).logits[0, :, : SIZES["vocab_size"]]
    torch.testing.assert_close(load(tmp_path / "ours", device="cpu").logits(tokens), expected, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_imported_and_exported_is_the_same_file(tmp_path, dtype, tied):
    write_gpt2(tmp_path / "theirs", dtype=dtype, tie_word_embeddings=tied)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    (tmp_path / "again").mkdir()
    loaded = load_model(tmp_path / "ours", CPU)
    write_weights(
        renamed(loaded.model.state_dict(), loaded.model.cfg, loaded.tokenizer.vocab_size), tmp_path / "again", dtype
    )
    one, other = (tmp_path / folder / "model.safetensors" for folder in ("theirs", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_an_export_of_it_tells_that_it_was_imported(source, tmp_path):
    imported(source, tmp_path / "out")
    card = model_card(
        load_model(tmp_path / "out", CPU), "mine", None, 10, 0, drawn=write_curves(tmp_path / "out", tmp_path)
    )
    assert "2 heads and a width of 32, imported from a Hugging Face folder, and not trained since." in card
    assert "validation data" not in card


def test_the_folder_has_the_tokenizer_by_which_data_is_built(source, tmp_path):
    imported(source, tmp_path / "out")
    tokenizer, package = Tokenizer.load(tmp_path / "out"), of_the_package(source / "tokenizer.json")
    assert tokenizer.encode("the cat\n").tolist() == package.encode("the cat\n").ids
    assert tokenizer.sha256 == Tokenizer.load(source).sha256


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_model_is_taken_as_it_is(copy, tmp_path, name):
    (copy / "tokenizer.json").unlink()
    (copy / name).write_bytes(small_tokenizer("bpe").model_bytes)
    assert main(["import", str(copy), str(tmp_path / "out")]) == 0
    assert Tokenizer.load(tmp_path / "out").sha256 == small_tokenizer("bpe").sha256


def masks(model: "GPT2LMHeadModel") -> dict[str, torch.Tensor]:
    """The buffers that older versions saved."""
    n = SIZES["n_positions"]
    one = {"attn.bias": torch.ones(1, 1, n, n).tril().byte(), "attn.masked_bias": torch.tensor(-1e4)}
    return {f"transformer.h.{i}.{name}": mask for i in range(SIZES["n_layer"]) for name, mask in one.items()}


def as_of_2019(model: "GPT2LMHeadModel", folder: Path) -> None:
    """Base model: no prefix, masks, torch's older pickles, no model_type, and GPT-2's own two tokenizer files."""
    tensors = {**model.state_dict(), **masks(model)}
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
    }
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = {**SIZES, "n_ctx": SIZES["n_positions"], "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config))
    spec = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(spec["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in spec["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def as_of_2021(model: "GPT2LMHeadModel", folder: Path) -> None:
    """With a copy of the tied output head in another type, and masks, in one pickle."""
    tensors = {**model.state_dict(), **masks(model)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def in_several_pickles(model: "GPT2LMHeadModel", folder: Path) -> None:
    tensors = model.state_dict()
    files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def in_several_files(model: "GPT2LMHeadModel", folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def in_the_cache_of_the_hub(model: "GPT2LMHeadModel", folder: Path) -> None:
    """Each file is a link to a blob of another folder."""
    in_several_files(model, folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


def tied_under_the_other_name(model: "GPT2LMHeadModel", folder: Path) -> None:
    tensors = dict(model.state_dict())
    del tensors["transformer.wte.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        *(as_of_2019, as_of_2021, in_several_pickles),
        *(in_several_files, in_the_cache_of_the_hub, tied_under_the_other_name),
    ],
)
def test_folders_of_all_times_hold_the_same_model(source, copy, tmp_path, capsys, write: Callable):
    (copy / "model.safetensors").unlink()
    write(gpt2(), copy)
    if list(copy.glob("*.bin")):
        assert main(["import", str(copy), str(tmp_path / "out")]) == 2
        assert "give --allow-pickle if you trust it" in capsys.readouterr().err
    found = imported(copy, tmp_path / "out", "--allow-pickle")
    expected = load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    text = "the cat\n\tsat 1234 it's"
    assert Tokenizer.load(tmp_path / "out").encode(text).tolist() == Tokenizer.load(source).encode(text).tolist()


def test_rows_that_pad_the_vocabulary_take_no_more_than_their_share():
    embedding = torch.normal(0.0, 1.0, (330, 32), generator=torch.Generator().manual_seed(0))
    more = padded(embedding, 384)
    assert torch.equal(more[:330], embedding)
    hidden = torch.normal(0.0, 1.0, (100, 32), generator=torch.Generator().manual_seed(1))
    raised = (hidden @ more.T).logsumexp(-1) - (hidden @ embedding.T).logsumexp(-1)
    assert 0.0 < raised.max().item() <= torch.log(torch.tensor(1 + 54 / 330)).item()
    assert torch.equal(padded(embedding, 128), embedding[:128])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "merges.txt",
            lambda text: "".join(text.splitlines(keepends=True)[:40]),
            r"merges.txt is cut off: none of its ",
        ),
        ("merges.txt", lambda text: text[:300], "transformers cannot read the tokenizer"),
        ("vocab.json", lambda text: text[:300], "transformers cannot read the tokenizer"),
        ("vocab.json", lambda text: "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_damaged_files_of_an_old_tokenizer_are_named(copy, tmp_path, capsys, name, content, complaint):
    """Merges that are cut at the end of a line would be another tokenizer."""
    as_of_2019(gpt2(), copy)
    (copy / name).write_text(content((copy / name).read_text()))
    assert main(["import", str(copy), str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def pickled_call(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": print}, folder / "pytorch_model.bin")


def index(folder: Path, other: str) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": other}})
    )


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


WTE, NORM = "transformer.wte.weight", "transformer.ln_f.weight"
WRONG: list[tuple[Callable[[Path], object], str]] = [
    (
        changed_config(model_type="mistral", architectures=["MistralForCausalLM"]),
        r"of type mistral \(MistralForCausalLM\)",
    ),
    (changed_config(model_type=None, n_head=None, n_embd=None, hidden_size=3), "n_embd=3 is not a multiple of"),
    (changed_config(activation_function="gelu"), "activation_function='gelu', and megagpt's GPT-2 computes with"),
    (changed_config(layer_norm_epsilon=0.0), "norm_eps=0.0.* at least 1e-12"),
    (changed_config(n_inner=100), r"c_fc.bias has shape \(128,\), and by config.json it has \(100,\)"),
    (changed_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (
        changed_config(auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        "auto_map={'AutoModelForCausalLM': .* null alone",
    ),
    (changed_config(n_layer="two"), "has sizes of no model: n_layer='two'"),
    (changed_config(vocab_size="many"), "vocab_size='many' is no number"),
    (changed_config(n_layer=1), "has transformer.h.1.attn.c_attn.bias, transformer.h.1.attn.c_attn.weight, .* 8 more"),
    (changed_config(n_layer=3), "lacks h.2.ln_1.weight, h.2.ln_1.bias, .* and 8 more"),
    (changed_config(n_positions=128), r"wpe.weight has shape \(64, 32\), and by config.json it has \(128, 32\)"),
    (changed_config(tie_word_embeddings=False), "lacks lm_head.weight; fetch the folder again"),
    (cut("config.json", 40), "config.json is damaged: it is not whole JSON"),
    (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json; give the folder that from_pretrained reads",
    ),
    (changed_tensors(lambda t: t.pop(NORM)), "lacks ln_f.weight; fetch the folder again"),
    (changed_tensors(lambda t: t.update(score=t[NORM].clone())), "has score, which GPT-2 has not"),
    (changed_tensors(lambda t: t.update({"ln_f.weight": t[NORM].clone()})), "has the tensor ln_f.weight twice"),
    (changed_tensors(lambda t: t.update({NORM: t[NORM] / 0.0})), "numbers in ln_f.weight that are not finite"),
    (
        changed_tensors(lambda t: t.update({WTE: t[WTE] / 0, "lm_head.weight": t[WTE] / 0})),
        r"numbers in (wte|lm_head).weight that",
    ),
    (changed_tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "numbers of type torch.int8; .* quantized"),
    (
        changed_tensors(lambda t: t.update({"lm_head.weight": t[WTE] + 1})),
        "lm_head.weight and wte.weight that differ, and config",
    ),
    (cut("model.safetensors", 5000), "model.safetensors is damaged or cut off"),
    (cut("model.safetensors", 0), "model.safetensors is damaged or cut off"),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "one.safetensors") and index(folder, "../x"),
        "'../x'",
    ),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "one.safetensors") and index(folder, "2"),
        "2 cannot",
    ),
    (pointer, "is a Git LFS pointer, not the file itself"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors, no model.safetensors.index"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"), ", and has tf_model.h5; save"),
    (pickled_call, "pytorch_model.bin is damaged, or holds more than tensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: no tokenizer.json"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'), "eos_token='</s>' is no"),
    (lambda folder: write_tokenizer(folder, "llama", "</s>"), "does not match its model: it has 380 tokens, and"),
]


@pytest.mark.parametrize(("spoil", "complaint"), WRONG, ids=[complaint for _, complaint in WRONG])
def test_another_model_or_a_damaged_one_is_one_message(copy, tmp_path, capsys, spoil, complaint):
    spoil(copy)
    assert main(["import", str(copy), str(tmp_path / "out"), "--allow-pickle"]) == 2
    said = capsys.readouterr().err
    assert re.search(complaint, said)
    assert said.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("gpt2", "gpt2 does not exist; give the folder of a model: names of the hub are not downloaded, but `hf downl"),
        ("{source}/model.safetensors", "is a file; give the folder that it is in"),
        ("{source}/..", "has no config.json; did you mean {source}/../small?"),
        ("{dataset}", "is a dataset; give the folder of a model"),
        ("{out}", "is megagpt's own and needs no import: give megagpt.init_from="),
    ],
)
def test_what_is_no_such_folder_is_named(source, dataset, tmp_path, capsys, wrong, complaint):
    imported(source, tmp_path / "out")
    places = {"source": source, "dataset": dataset, "out": tmp_path / "out"}
    assert main(["import", wrong.format(**places), str(tmp_path / "new")]) == 2
    assert complaint.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(source, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert main(["import", str(source), str(tmp_path / "mine")]) == 2
    assert "is not empty, and nothing in it is overwritten" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert main(["import", str(source), str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out cannot be written: [Errno 27] File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("missing", "kind"), [("safetensors", "import"), ("transformers", "the tokenizer of")])
def test_a_missing_package_is_named_with_its_extra(copy, tmp_path, monkeypatch, capsys, missing, kind):
    as_of_2019(gpt2(), copy)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["import", str(copy), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"error: {kind}" in said
    assert f"needs {missing}; install with pip install -e '.[huggingface]'" in said


def test_a_run_cannot_be_in_such_a_folder(source, dataset, device, tmp_path):
    imported(source, tmp_path / "out")
    with pytest.raises(UserError, match="is one step's folder and not a run's; give another"):
        train(debug_run(dataset, tmp_path / "out"), device)


def test_data_must_be_given_to_evaluate(source, tmp_path, capsys):
    imported(source, tmp_path / "out")
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert "was imported, and no data with it; give a dataset by --data DIR" in capsys.readouterr().err
