"""A build with a tokenizer that loses text tells how much at its start and at its end, and names the way out."""

import json
import re
from pathlib import Path

import pytest
from data_support import lossy_tokenizer, run, small_tokenizer, write_texts

import data_tools.stages.lost_text
from data_tools.build import build
from data_tools.config import BuildConfig

OTHERS = "\u0436\u0443\u043a " * 30  # 7 bytes each, 6 of them lost


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_texts(tmp_path / "in", 20)
    for i in range(20):
        (tmp_path / "in" / f"other-{i}.txt").write_text(OTHERS + str(i), encoding="utf-8")
    return tmp_path / "in"


def test_a_build_tells_what_is_lost(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "lossy.model", tmp_path / "out"
    model.write_bytes(lossy_tokenizer().model_bytes)
    files = [file.read_text(encoding="utf-8") for file in texts.iterdir()]
    lost = sum(lossy_tokenizer().lost(text).total() for text in files)
    share = lost / sum(len(text.encode()) for text in files)
    shown_share = f"{100 * share:.3g}%"
    arguments = ("build", "--input", texts, "--out", out)
    assert run(*arguments, f"tokenizer={model}", "val_fraction=0.2") == 0
    shown = capsys.readouterr()
    assert f"warning: tokenizer={model} loses {shown_share} of the text" in shown.err
    assert "most of all '\u0436\u0443\u043a', " in shown.err
    assert f"the tokenizer loses {shown_share} of the text" in shown.out
    report = json.loads((out / "report.json").read_text())
    assert report["lost_text"]["share"] == pytest.approx(share)
    assert shown_share in (out / "report.html").read_text()
    # the way out, as typed
    assert "without tokenizer=, one is trained that loses nothing" in shown.err
    assert run("build", "--input", texts, "--out", tmp_path / "other", "val_fraction=0.2", "vocab_size=300") == 0
    assert "loses" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["lossless", "lossy"])
def test_nothing_is_told_where_nothing_is_lost(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.txt").write_text("the cat sat on a mat" * i + "the")
    tokenizer = small_tokenizer() if kind == "lossless" else lossy_tokenizer()
    (tmp_path / "x.model").write_bytes(tokenizer.model_bytes)
    arguments = ("--input", tmp_path / "in", "--out", tmp_path / "out")
    assert run("build", *arguments, f"tokenizer={tmp_path / 'x.model'}", "val_fraction=0.2") == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    assert ("the tokenizer may lose text that was not measured" in shown.out) == (kind == "lossy")


def test_of_a_large_corpus_a_part_is_measured(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.stages.lost_text, "MEASURED_BYTES", 4000)
    (tmp_path / "x.model").write_bytes(lossy_tokenizer().model_bytes)
    arguments = ("--input", texts, "--out", tmp_path / "out", f"tokenizer={tmp_path / 'x.model'}")
    assert run("build", *arguments, "val_fraction=0.2") == 0
    [(measured, unit)] = re.findall(r"\(of (\S+) (k?B) measured\)", capsys.readouterr().err)
    assert 2000 < float(measured) * {"B": 1, "kB": 1000}[unit] < 7000


def test_a_corpus_of_few_pieces_is_measured_in_sections_and_never_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long document is one piece; 300 copies of another leave a small share of the rest."""
    (tmp_path / "x.model").write_bytes(lossy_tokenizer().model_bytes)
    options = BuildConfig(tokenizer=tmp_path / "x.model", val_fraction=0)
    (tmp_path / "long.txt").write_text(OTHERS * 1000, encoding="utf-8")
    row = json.dumps({"text": OTHERS}) + "\n"
    (tmp_path / "copies.jsonl").write_text(row * 300, encoding="utf-8")
    monkeypatch.setattr(data_tools.stages.lost_text, "MEASURED_BYTES", 40_000)
    long = build([tmp_path / "long.txt"], tmp_path / "long", options)["lost_text"]
    assert 10_000 < long["measured"] < 150_000
    monkeypatch.setattr(data_tools.stages.lost_text, "MEASURED_BYTES", 1)
    copies = build([tmp_path / "copies.jsonl"], tmp_path / "copies", options)["lost_text"]
    assert copies["measured"] == len(OTHERS.encode())
    assert [copies["share"], long["share"]] == pytest.approx([6 / 7, 6 / 7], rel=0.01)
