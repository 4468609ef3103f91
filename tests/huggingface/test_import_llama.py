"""`megagpt import` of Llama and Qwen3: the logits of transformers 4 and 5; what computes otherwise is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models_of_others import LLAMA_SIZES, changed_config, changed_tensors, cut, llama, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from megagpt import load
from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.huggingface.weights import renamed, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = LLAMA_SIZES["vocab_size"]
TOKENS = torch.randint(ROWS, (64,), generator=torch.Generator().manual_seed(0))
LINEAR = {"rope_type": "linear", "factor": 4.0}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
    {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"hidden_size": 48, "head_dim": 12, "num_hidden_layers": 3, "rope_parameters": {**LINEAR, "rope_theta": 2e4}},
    {"vocab_size": 500, "intermediate_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
]
KINDS = ["llama", "qwen3"]


def logits(theirs: "PreTrainedModel") -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = theirs.float()(input_ids=TOKENS.unsqueeze(0)).logits[0, :, :ROWS]
    return found


def imported_logits(folder: Path, out: Path) -> torch.Tensor:
    assert main(["import", str(folder), str(out)]) == 0
    return load(out, device="cpu").logits(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_are_those_of_transformers(tmp_path, kind, sizes):
    theirs = write_llama(tmp_path / "theirs", kind, **sizes)
    found = imported_logits(tmp_path / "theirs", tmp_path / "ours")
    torch.testing.assert_close(found, logits(theirs), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LINEAR], ids=str)
def test_positions_are_read_as_transformers_4_wrote_them(tmp_path, kind, scaling):
    """Its keys are two, where 5 writes rope_parameters."""
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": 700.0}
    theirs = write_llama(tmp_path / "theirs", kind, rope_parameters=parameters)
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    older = {"rope_theta": 700.0, "rope_scaling": scaling, "torch_dtype": "float32", "pretraining_tp": 1}
    path.write_text(json.dumps(config | older))
    found = imported_logits(tmp_path / "theirs", tmp_path / "ours")
    torch.testing.assert_close(found, logits(theirs), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_imported_and_exported_is_the_same_file(tmp_path, kind, dtype, tied):
    write_llama(tmp_path / "theirs", kind, dtype=dtype, tie_word_embeddings=tied)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    (tmp_path / "again").mkdir()
    loaded = load_model(tmp_path / "ours", torch.device("cpu"))
    assert loaded.model.cfg.tied == tied
    weights = renamed(loaded.model.state_dict(), loaded.model.cfg, loaded.tokenizer.vocab_size)
    write_weights(weights, tmp_path / "again", dtype)
    one, other = (tmp_path / folder / "model.safetensors" for folder in ("theirs", "again"))
    assert one.read_bytes() == other.read_bytes()


def in_several_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    llama().save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("model-*.safetensors"))) == 7


def of_llama_2(folder: Path) -> None:
    """With the frequencies of its rotary positions, which transformers no longer reads."""
    tensors = load_file(folder / "model.safetensors")
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(tensors | frequencies, folder / "model.safetensors")


def without_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "small"
    write_llama(folder)
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    """A folder to be changed."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("write", [in_several_files, of_llama_2, without_prefix])
def test_folders_of_all_times_hold_the_same_model(copy, tmp_path, write: Callable):
    write(copy)
    torch.testing.assert_close(imported_logits(copy, tmp_path / "out"), logits(llama()), rtol=0.0, atol=1e-4)


def test_a_token_that_begins_texts_there_and_not_here_is_told(copy, tmp_path, capsys):
    write_tokenizer(copy, "llama", "</s>")
    changed_config(vocab_size=380, bos_token_id=1, eos_token_id=2)(copy)
    changed_tensors(lambda tensors: tensors.update({name: torch.ones(380, 32) for name in ENDS}))(copy)
    assert main(["import", str(copy), str(tmp_path / "out")]) == 0
    assert "names token 1 (<s>) as the beginning of a text; here each begins with 2 (</s>)" in capsys.readouterr().out


def test_a_number_that_is_no_token_is_not_told_as_one(copy, tmp_path, capsys):
    changed_config(bos_token_id=-1, eos_token_id=-1)(copy)
    assert main(["import", str(copy), str(tmp_path / "out")]) == 0
    assert "note" not in capsys.readouterr().out


def of_qwen3(**config: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        write_llama(folder, "qwen3")
        changed_config(**config)(folder)

    return write


def of_another(kind: str) -> Callable[[Path], object]:
    return lambda folder: write_llama(folder, kind)


ENDS = ("model.embed_tokens.weight", "lm_head.weight")
QUERIES, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
WRONG: list[tuple[Callable[[Path], object], str]] = [
    (
        of_another("mistral"),
        r"is a model of type mistral \(MistralForCausalLM\), and megagpt imports GPT-2, Llama and ",
    ),
    (of_another("gemma"), r"is a model of type gemma \(GemmaForCausalLM\)"),
    (of_another("qwen2"), r"is a model of type qwen2 \(Qwen2ForCausalLM\)"),
    (changed_config(model_type=["llama"]), r"is a model of type \['llama'\] \(LlamaForCausalLM\)"),
    (changed_config(model_type="qwen3"), "lacks layers.0.self_attn.q_norm.weight, layers.0"),
    (of_qwen3(model_type="llama"), "has model.layers.0.self_attn.k_norm.weight, .*, which Llama has not"),
    (changed_config(rope_parameters=LLAMA3), "rope_parameters.rope_type='llama3', and megagpt's Llama computes with"),
    (changed_config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dynamic', "),
    (changed_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling.rope_type='yarn', "),
    (
        changed_config(rope_parameters={"rope_type": "linear"}),
        "has sizes of no model: rotary_scaling=null is not a number",
    ),
    (
        changed_config(rope_scaling=LINEAR),
        "contradicts itself: rope_scaling={'rope_type': 'linear', .*, rope_parameters={'rope_theta",
    ),
    (changed_config(rope_theta=500.0), "contradicts itself: rope_theta=500.0, rope_parameters={'rope_theta': 10000.0"),
    (changed_config(rope_parameters={"full_attention": {}}), "rope_parameters={'full_attention': {}}, and megagpt's"),
    (changed_config(rope_parameters="linear"), "rope_parameters='linear', and megagpt's"),
    (changed_config(rope_parameters={"partial_rotary_factor": 0.5}), "rope_parameters.partial_rotary_factor=0.5, "),
    (changed_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5, "),
    (changed_config(attention_bias=True), "attention_bias=True, and megagpt's Llama computes with false alone"),
    (changed_config(mlp_bias=True), "mlp_bias=True, "),
    (changed_config(hidden_act="gelu"), "hidden_act='gelu', and megagpt's Llama computes with \"silu\" or"),
    (changed_config(head_dim=16), "head_dim=16, and megagpt's Llama computes with 8 alone"),
    (of_qwen3(head_dim=128), "head_dim=128, and megagpt's Qwen3 computes with 8 alone"),
    (of_qwen3(use_sliding_window=True), "use_sliding_window=True, "),
    (of_qwen3(layer_types=["full_attention", "sliding_attention"]), r"layer_types=\['sliding_attention'\], "),
    (of_qwen3(layer_types=7), "layer_types=7, "),
    (changed_config(is_causal=False), "is_causal=False, and megagpt's Llama computes with true alone"),
    (changed_config(num_attention_heads=5), "n_embd=32 is not a multiple of"),
    (
        changed_config(num_attention_heads=8, head_dim=4),
        r"k_proj.weight has shape \(16, 32\), and by config.json .*\(8, ",
    ),
    (changed_config(rms_norm_eps="small"), "has sizes of no model: norm_eps='small'"),
    (changed_config(num_hidden_layers=1), "has model.layers.1.input_layernorm.weight, .* and 5 more, which Llama has"),
    (changed_config(tie_word_embeddings=True), "has lm_head.weight and embed_tokens.weight that differ, and config"),
    (changed_tensors(lambda t: t.pop(QUERIES)), "lacks layers.1.self_attn.q_proj.weight; fetch the folder again"),
    (changed_tensors(lambda t: t.update({"lm_head.bias": t[NORM].clone()})), "has lm_head.bias, which Llama has not"),
    (
        changed_tensors(lambda t: t.update({QUERIES: t[QUERIES] / 0.0})),
        "numbers in layers.1.self_attn.q_proj.weight that",
    ),
    (
        changed_tensors(lambda t: t.update({QUERIES: t[QUERIES].to(torch.int8)})),
        "q_proj.weight has numbers of type torch.",
    ),
    (cut("model.safetensors", 5000), "model.safetensors is damaged or cut off"),
    (
        lambda folder: (in_several_files(folder), cut("model-00002-of-00007.safetensors", 900)(folder)),
        "00002-of-00007.saf",
    ),
    (
        lambda folder: (in_several_files(folder), (folder / "model-00002-of-00007.safetensors").unlink()),
        "cannot be read",
    ),
]


@pytest.mark.parametrize(("spoil", "complaint"), WRONG, ids=[complaint for _, complaint in WRONG])
def test_another_model_or_a_damaged_one_is_one_message(copy, tmp_path, capsys, spoil, complaint):
    spoil(copy)
    assert main(["import", str(copy), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(complaint, said)
    assert said.startswith("error: ")
    assert len(said) < 800
    assert sorted(tmp_path.iterdir()) == [copy]
