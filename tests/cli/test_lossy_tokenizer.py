"""A tokenizer that loses text: a run, `megagpt evaluate` and `megagpt generate` tell what it leaves out."""

import json
import math
from pathlib import Path

import pytest
import torch
from data_support import lossy_tokenizer, write_texts
from support import debug_run, metric

import megagpt
from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.__main__ import main
from megagpt.data.dataset import open_dataset
from megagpt.train.trainer import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the bytes of each text are of letters that the tokenizer has no piece for."""
    folder = tmp_path_factory.mktemp("lossy")
    for i, text in enumerate(write_texts(folder / "in", 80)):
        (folder / "in" / f"doc-{i:03d}.txt").write_text("\u4f60" * (len(text) // 3) + " " + text, encoding="utf-8")
    (folder / "x.model").write_bytes(lossy_tokenizer().model_bytes)
    build([folder / "in"], folder / "out", BuildConfig(tokenizer=folder / "x.model", val_fraction=0.3))
    return folder / "out"


@pytest.fixture(scope="module")
def trained(dataset: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out_dir = tmp_path_factory.mktemp("run") / "run"
    steps = ("megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=1", "megagpt.every.eval=2")
    options = (*steps, "megagpt.every.sample=2", 'megagpt.sample.prompts=["the \u4f60\u597d cat"]')
    run = debug_run(dataset, out_dir, *options, "megagpt.data.val_tokens=null", "megagpt.every.log=1")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("megagpt.train.opening.print_rank0", lambda text, **_: said.append(text))
        train(run, device)
    return out_dir, "\n".join(said)


def test_a_run_tells_what_its_tokenizer_loses(trained: tuple[Path, str]) -> None:
    _, said = trained
    assert "the tokenizer loses text: " in said
    assert "of these tokens are <unk>, text that it cannot spell, and it changes text before it encodes it" in said
    assert "cannot spell the prompt 'the \u4f60\u597d cat': at character 4 the model reads ' \u2047  cat'" in said


def test_bits_per_byte_are_those_of_the_documents(
    trained: tuple[Path, str], dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    split = open_dataset(dataset).manifest.splits["val"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(dataset), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    whole = split.bytes * row["tokens"] / split.tokens  # the last window may leave less than 64 tokens out
    assert row["bytes"] == pytest.approx(whole, rel=0.02)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / row["bytes"])
    assert row["bits_per_byte"] == pytest.approx(metric(run, "val/bits_per_byte")[2], rel=1e-4)
    assert 0 < row["unknown_tokens"] < 0.1
    assert main(["evaluate", str(run), "--data", str(dataset)]) == 0
    out = capsys.readouterr().out
    assert "estimated" not in out
    assert f"the tokenizer loses text: {100 * row['unknown_tokens']:.3g}% of these tokens are <unk>" in out


def test_a_prompt_that_cannot_be_spelled_is_told(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    command = ["generate", str(run), "--max-tokens", "2"]
    for prompt, told in (
        ("the \u4f60\u597d", "prompt 'the \u4f60\u597d': at character 4 the model reads ' \u2047 ' instead of '\u4f60"),
        ("the\n\ncat", r"prompt 'the\n\ncat': at character 3 the model reads ' cat' instead of '\n\ncat'"),
        ("the cat", ""),
    ):
        capsys.readouterr()
        assert main([*command, "--prompt", prompt]) == 0
        err = capsys.readouterr().err
        assert told in err
        assert err.count("warning: ") == bool(told)


def test_text_of_a_python_program_that_cannot_be_spelled_is_told_and_its_bytes_count(trained: tuple[Path, str]) -> None:
    model = megagpt.load(trained[0])
    with pytest.warns(UserWarning, match="cannot spell the text: at character 4 the model reads"):
        assert model.score("the \u4f60\u597d").bytes == 10
    with pytest.warns(UserWarning, match="cannot spell the prompt 'the \u4f60"):
        model.generate("the \u4f60", max_tokens=1)


def test_of_a_dataset_of_before_the_bytes_are_an_estimate_and_so_it_says(
    trained: tuple[Path, str], dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagpt.data.text_bytes.BYTES", "absent")
    run, _ = trained
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(dataset), "--tokens", "640"]) == 0
    assert "the bytes are estimated by the split's mean" in capsys.readouterr().out


def test_a_prompt_of_another_encoding_is_refused(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Python decodes bytes of the command line that are not UTF-8 to lone surrogates."""
    run, _ = trained
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", b"caf\xe9".decode(errors="surrogateescape")]) == 2
    assert capsys.readouterr().err.startswith(r"error: --prompt 'caf\udce9' holds bytes that are not UTF-8")
