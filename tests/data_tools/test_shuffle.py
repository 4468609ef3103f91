"""Shuffling token files into shards: merging them in groups first, however small, changes no byte of a dataset."""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_support import document, lossy_tokenizer, small_tokenizer

import data_tools.readers.document_pieces
import data_tools.readers.formats.plain_text
import data_tools.readers.work_units
import data_tools.stages.pipeline
import data_tools.stages.shuffle
import data_tools.stages.tokenize
import data_tools.storage.token_files
from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.atomic_files import sha256_of
from megagpt.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of which each is several units of several token files; equal documents, and a long one in many rows."""
    for module in (data_tools.readers.document_pieces, data_tools.readers.formats.plain_text):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 300)
    monkeypatch.setattr(data_tools.stages.tokenize, "FILE_TOKENS", 100)
    monkeypatch.setattr(data_tools.stages.pipeline, "PASS_TOKENS", 1000)
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for i in range(5):
            (tmp_path / source / f"{i}.txt").write_text(document(i % 4, n_words=400 if i == 3 else 40))
    return [tmp_path / "a", tmp_path / "b"]


def files_of(dataset: Path) -> dict[str, str]:
    paths = [path for path in dataset.rglob("*") if path.suffix in (".arrow", ".parquet", ".model")]
    return {str(path.relative_to(dataset)): sha256_of(path) for path in paths}


@pytest.mark.parametrize("tokenizer", [small_tokenizer, lossy_tokenizer])  # with the latter, rows have their bytes
def test_merging_in_groups_changes_no_byte(
    tokenizer: Callable[[], Tokenizer], inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "small.model"
    model.write_bytes(tokenizer().model_bytes)
    options = BuildConfig(
        tokenizer=model,
        val_fraction=0.3,
        shard_tokens=500,
        dedup={"method": "none"},
        subword={"variants": int(tokenizer().is_lossless)},
    )
    build(inputs, tmp_path / "at once", options)
    merged: list[int] = []
    merge = data_tools.stages.shuffle.merge_group

    def merge_group(*args: object) -> dict[str, object]:
        merged.append(1)
        return merge(*args)

    monkeypatch.setattr(data_tools.stages.shuffle, "merge_group", merge_group)
    monkeypatch.setattr(data_tools.stages.shuffle, "MERGE_FILES", 3)
    monkeypatch.setattr(data_tools.stages.shuffle, "PASS_TOKENS", 150)
    monkeypatch.setattr(data_tools.stages.shuffle, "BATCH_TOKENS", 60)
    build(inputs, tmp_path / "in groups", options)
    assert len(merged) > 5  # several levels of each split and variant
    assert files_of(tmp_path / "at once") == files_of(tmp_path / "in groups")
    assert len(files_of(tmp_path / "at once")) > 8
