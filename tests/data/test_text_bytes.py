"""Bits per byte divide by the bytes of the documents, also with a tokenizer that loses text."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_support import lossy_tokenizer, open_files_left, small_tokenizer, write_texts

from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.storage.token_files import EXTRA
from megagpt.config.model import ModelConfig
from megagpt.data.dataset import Dataset, open_dataset
from megagpt.data.loader import ValWindows
from megagpt.data.lost_text import lost_text, token_counts, unknown_share
from megagpt.data.provenance import BYTES, origins
from megagpt.data.text_bytes import text_bytes, text_bytes_by_source
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train.evaluate import evaluate

UNKNOWN = "\u4f60\u597d " * 40  # letters that lossy_tokenizer has no piece for
WIDE = "\uff43\uff41\uff54 " * 30  # "cat " in full-width letters, which it changes to the usual ones: 10 bytes to 4


def built(folder: Path, tokenizer: Tokenizer, *texts: str) -> Dataset:
    """A dataset, of prose and these texts in turn, half of it for validation; resumes a build that was killed."""
    if not (folder / "in").exists():
        write_texts(folder / "in", 20)
        for i, text in enumerate(texts * 10):
            (folder / "in" / f"other-{i:02d}.txt").write_text(f"{text}{'the ' * i}", encoding="utf-8")
    (folder / "x.model").write_bytes(tokenizer.model_bytes)
    options = BuildConfig(tokenizer=folder / "x.model", val_fraction=0.5, shard_tokens=1000)
    build([folder / "in"], folder / "out", options)
    return open_dataset(folder / "out")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return built(tmp_path_factory.mktemp("lossy"), lossy_tokenizer(), UNKNOWN, WIDE)


def test_the_bytes_of_the_first_documents_are_those_of_their_files(lossy: Dataset) -> None:
    stream = lossy.stream("val")
    files = [Path(origin.file) for origin in origins(lossy, "val", range(stream.n_rows))]
    totals = np.cumsum([file.stat().st_size for file in files])
    assert len(lossy.manifest.splits["val"].variants[0].shards) > 1
    for end, total in zip(stream.row_ends().tolist(), totals.tolist(), strict=True):
        assert text_bytes(stream, 0, end) == (total, True)
    assert totals[-1] == lossy.manifest.splits["val"].bytes


def test_a_row_that_is_cut_counts_in_proportion(lossy: Dataset) -> None:
    stream = lossy.stream("val")
    first = int(stream.row_ends()[0])
    size = text_bytes(stream, 0, first).bytes
    assert text_bytes(stream, 0, first // 2).bytes == pytest.approx(size * (first // 2) / first, abs=0.5)
    assert text_bytes(stream, first // 2, first).bytes == pytest.approx(size - size * (first // 2) / first, abs=0.5)


def test_the_bytes_of_each_source_are_those_of_its_files(tmp_path: Path) -> None:
    for name, n_words in (("one", 40), ("two", 80)):
        write_texts(tmp_path / name, 12, n_words)
    (tmp_path / "two" / "wide.txt").write_text(WIDE, encoding="utf-8")
    (tmp_path / "x.model").write_bytes(lossy_tokenizer().model_bytes)
    options = BuildConfig(tokenizer=tmp_path / "x.model", val_fraction=0.5, shard_tokens=500)
    build([tmp_path / "one", tmp_path / "two"], tmp_path / "out", options)
    stream = open_dataset(tmp_path / "out").stream("val")
    expected = {"one": 0, "two": 0}
    for origin in origins(stream.dataset, "val", range(stream.n_rows)):
        expected[origin.source] += Path(origin.file).stat().st_size
    assert min(expected.values()) > 0
    assert text_bytes_by_source(stream, 0, stream.n_tokens).tolist() == pytest.approx(list(expected.values()))
    third = stream.n_tokens // 3
    parts = [text_bytes_by_source(stream, *part) for part in ((0, third), (third, stream.n_tokens))]
    assert sum(parts).tolist() == pytest.approx(list(expected.values()))
    assert parts[0].sum() == pytest.approx(text_bytes(stream, 0, third).bytes, abs=0.5)


def test_the_pieces_of_a_lossless_tokenizer_have_the_bytes_of_the_text(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    dataset = built(tmp_path, tokenizer, UNKNOWN, WIDE)
    tokens = np.concatenate(list(dataset.stream("val").documents()))
    assert tokenizer.token_bytes()[tokens].sum() == dataset.manifest.splits["val"].bytes
    assert ValWindows(dataset.stream("val"), 16).text_bytes is None
    assert BYTES not in pq.read_schema(dataset.path / "provenance/val/v0/shard-000000.parquet").names
    assert lost_text(0.0, tokenizer) == ""


def test_a_dataset_without_rows_bytes_counts_the_mean_of_the_split(
    lossy: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in datasets of an older megagpt."""
    monkeypatch.setattr("megagpt.data.text_bytes.BYTES", "absent")
    stream, split = lossy.stream("val"), lossy.manifest.splits["val"]
    assert text_bytes(stream, 0, stream.n_tokens) == (split.bytes, False)
    assert text_bytes(stream, 0, stream.n_tokens // 2).bytes == pytest.approx(split.bytes / 2, rel=0.01)


def test_a_damaged_file_of_rows_bytes_is_named_and_not_replaced_by_the_mean(lossy: Dataset, tmp_path: Path) -> None:
    folder = shutil.copytree(lossy.path, tmp_path / "out")
    files = sorted((folder / "provenance/val/v0").iterdir())
    first = files[0].read_bytes()
    stream = open_dataset(folder).stream("val")
    for damaged in (first[:-20], files[1].read_bytes()):  # cut, and with the rows of another shard
        files[0].write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"provenance/val/v0\S* is damaged .*; restore it or build the dataset again"
        ):
            text_bytes(stream, 0, stream.n_tokens)
    files[0].write_bytes(first)
    with open_files_left(0), pytest.raises(UserError, match="too many open files"):
        text_bytes(stream, 0, stream.n_tokens)
    assert text_bytes(stream, 0, stream.n_tokens).by_row
    files[0].unlink()
    assert not text_bytes(stream, 0, stream.n_tokens).by_row


@pytest.mark.usefixtures("device")
def test_bits_per_byte_divide_by_the_true_bytes(lossy: Dataset) -> None:
    windows, tokenizer = ValWindows(lossy.stream("val"), 16, 160), lossy.tokenizer()
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, seq_len=16), 128)
    result = evaluate(model, windows, torch.from_numpy(tokenizer.token_bytes()), micro_batch=4)
    expected = text_bytes(lossy.stream("val"), 1, 161).bytes
    assert result.bytes == expected
    assert result.bits_per_byte == pytest.approx(result.loss * 160 / math.log(2) / expected)


@pytest.mark.usefixtures("device")
def test_text_of_unknown_pieces_alone_can_be_evaluated(tmp_path: Path) -> None:
    tokenizer = lossy_tokenizer("word")
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("\u4f60\u597d" * (i + 1), encoding="utf-8")
    (tmp_path / "x.model").write_bytes(tokenizer.model_bytes)
    build([tmp_path], tmp_path / "out", BuildConfig(tokenizer=tmp_path / "x.model", val_fraction=0.5, include="*.txt"))
    windows = ValWindows(open_dataset(tmp_path / "out").stream("val"), 4)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, seq_len=4), 128)
    result = evaluate(model, windows, torch.from_numpy(tokenizer.token_bytes()), micro_batch=4)
    assert 0 < result.bits_per_byte < 1  # a document of up to 180 bytes is one token
    unknown = unknown_share(token_counts(windows), tokenizer)
    assert unknown == pytest.approx(0.5, abs=0.1)  # the others end documents
    assert f"{100 * unknown:.3g}% of these tokens are <unk>" in lost_text(unknown, tokenizer)
    assert "normalizer nmt_nfkc" in lost_text(0.0, tokenizer)


def test_a_build_that_an_older_data_tools_began_is_finished_without_rows_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token files have no bytes of text."""

    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as older:
        older.setattr("data_tools.storage.token_files._extra", lambda with_bytes: EXTRA)
        older.setattr("data_tools.stages.pipeline.write_shard", killed)
        with pytest.raises(Killed):
            built(tmp_path, lossy_tokenizer(), UNKNOWN, WIDE)
    stream = built(tmp_path, lossy_tokenizer(), UNKNOWN, WIDE).stream("val")
    split = stream.dataset.manifest.splits["val"]
    assert text_bytes(stream, 0, stream.n_tokens) == (split.bytes, False)
