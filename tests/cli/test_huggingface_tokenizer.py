"""Hugging Face tokenizers all the way: build, train, evaluate, generate and export, with the bytes of the text."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from data_support import write_texts
from support import debug_run, metric
from tokenizers_of_others import of_the_package, write_json

import megagpt
from data_tools.__main__ import main as data_tools
from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.verify import verify
from megagpt.__main__ import main
from megagpt.data.dataset import open_dataset
from megagpt.huggingface import export as exporting
from megagpt.huggingface.fast_tokenizer import exported_json, write_tokenizer
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train.trainer import train

STEPS = ("megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=1", "megagpt.every.eval=2")


def built(folder: Path, kind: str) -> tuple[Path, list[str]]:
    texts = write_texts(folder / "in", 80)
    for i, text in enumerate(texts):
        texts[i] = f"{text} </s> <|endoftext|> \u4f60\u597d {i}"
        (folder / "in" / f"doc-{i:03d}.txt").write_text(texts[i], encoding="utf-8")
    path = write_json(folder / "model", kind)
    build([folder / "in"], folder / "data", BuildConfig(tokenizer=path.parent, val_fraction=0.3, workers=1))
    return folder / "data", texts


@pytest.fixture(scope="module")
def run(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A model of byte-level BPE: its run, its dataset, and the texts."""
    folder = tmp_path_factory.mktemp("gpt2")
    data, texts = built(folder, "gpt2")
    fim = ("megagpt.augment.fim.rate=0.5", "megagpt.data.val_tokens=null")
    train(debug_run(data, folder / "run", *STEPS, *fim), device)
    return folder / "run", data, texts


def test_documents_have_the_ids_of_the_package_and_their_end(run: tuple[Path, Path, list[str]]) -> None:
    _, data, texts = run
    own, dataset = of_the_package(data.parent / "model" / "tokenizer.json"), open_dataset(data)
    found = [ids.tolist() for split in ("train", "val") for ids in dataset.stream(split).documents()]
    assert sorted(found) == sorted([*own.encode(text).ids, 0] for text in texts)
    assert " is whole: " in verify(data)
    assert f"tokenizers {tokenizers.__version__}" in dataset.manifest.tool
    assert json.loads((data / "report.json").read_text())["loses_text"] is False


def test_bits_per_byte_divide_by_the_bytes_of_the_text(
    run: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, _ = run
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    stream = open_dataset(data).stream("val")
    documents = list(stream.documents())
    own = of_the_package(data.parent / "model" / "tokenizer.json")
    flat = [i for ids in documents for i in ids.tolist()][1 : row["tokens"] + 1]
    spelled = own.decode([i for i in flat if i != 0], skip_special_tokens=False)
    assert abs(row["bytes"] - len(spelled.encode())) <= 6  # a character may be cut at either end
    assert row["unknown_tokens"] == 0
    assert metric(folder, "val/bits_per_byte")[2] == pytest.approx(row["bits_per_byte"], rel=1e-4)


def test_a_model_is_loaded_with_its_tokenizer_and_writes_text(
    run: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = run
    assert main(["generate", str(folder), "--prompt", "the <|endoftext|> \u4f60", "--max-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert "the <|endoftext|> \u4f60" in said.out
    assert "cannot spell" not in said.err
    text = "the cat\u4f60"
    assert megagpt.load(folder).score(text).bytes == len(text.encode())


@pytest.mark.process
def test_the_tokenizer_is_exported_as_it_is(
    run: tuple[Path, Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, data, _ = run
    monkeypatch.setattr(exporting, "LINES", 2000)  # all 10,000 take seconds
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "The one that the data was built with, compared on" in (tmp_path / "out" / "README.md").read_text()
    assert "2,000 of 2,000 lines have the same token ids" in capsys.readouterr().out
    original = data.parent / "model" / "tokenizer.json"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == original.read_bytes()
    # what is exported builds data of the same tokenizer
    command = ["build", "--input", str(data.parent / "in"), "--out", str(tmp_path / "again"), "workers=1"]
    assert data_tools([*command, f"tokenizer={tmp_path / 'out'}", "val_fraction=0.3"]) == 0
    assert open_dataset(tmp_path / "again").fingerprint == open_dataset(data).fingerprint


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_bytes_are_counted_by_row_where_tokens_do_not_have_those_of_the_text(
    kind: str, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    data, texts = built(tmp_path, kind)
    said = capsys.readouterr().err
    assert ("of the text (of " in said) == (kind == "unigram")
    train(debug_run(data, tmp_path / "run", *STEPS), device)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    row, split = json.loads(capsys.readouterr().out), open_dataset(data).manifest.splits["val"]
    assert row["bytes"] == pytest.approx(split.bytes * row["tokens"] / split.tokens, rel=0.03)
    assert (row["unknown_tokens"] > 0) == (kind == "unigram")
    assert split.bytes + open_dataset(data).manifest.splits["train"].bytes == sum(len(text.encode()) for text in texts)


def test_an_export_adds_no_token_that_training_has_not_seen(tmp_path: Path) -> None:
    """Llama's file puts <s> before a text; what transformers loads of an export does not."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(write_json(tmp_path, "llama"))
    (tmp_path / "out").mkdir()
    write_tokenizer(exported_json(tokenizer), tokenizer, 64, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat </s>")["input_ids"]
    assert found == tokenizer.encode("the cat </s>").tolist()
