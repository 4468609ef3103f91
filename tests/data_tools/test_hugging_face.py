"""Folders as Hugging Face's libraries write them: their data is read, and nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from data_support import all_documents, run
from reader_support import arrow_stream, jsonl, parquet, read_all, skipped, texts_of

from data_tools.readers.by_format import NO_DATA
from data_tools.readers.document_pieces import DocumentPiece
from megagpt.errors import UserError

TEXTS = [f"document {i}" for i in range(7)]
OPTIONS = ("tokenizer_type=char", "val_fraction=0", "workers=1")
TRACKED = ("*.7z", "*.arrow", "*.parquet", "*.safetensors", "saved_model/**/*", "*.mp4")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in TRACKED)
CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# A corpus\n"


def saved(folder: Path) -> None:
    """What Dataset.save_to_disk writes, and what map() left there later."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder), num_shards=2)
    loaded = datasets.load_from_disk(str(folder))
    loaded.map(lambda row: {"text": "cached " + row["text"]})
    assert list(folder.glob("cache-*.arrow"))


def saved_splits(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    halves = {"train": TEXTS[:4], "validation": TEXTS[4:]}
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in halves.items()}
    datasets.DatasetDict(parts).save_to_disk(str(folder))


def cached(folder: Path) -> None:
    """What load_dataset keeps in ~/.cache/huggingface/datasets."""
    import datasets

    datasets.disable_progress_bars()
    source = folder.with_suffix(".jsonl")
    source.write_bytes(jsonl(TEXTS))
    loaded = datasets.load_dataset("json", data_files=str(source), cache_dir=str(folder), split="train")
    loaded.map(lambda row: {"text": "cached " + row["text"]})
    unfinished = next(folder.rglob("dataset_info.json")).parent.with_suffix(".incomplete")
    unfinished.mkdir()
    (unfinished / "json-train.arrow").write_bytes(arrow_stream(["unfinished"]))
    assert list(folder.rglob("cache-*.arrow"))


def write_repository(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00002.parquet").write_bytes(parquet(TEXTS[:3]))
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(parquet(TEXTS[3:]))
    for name, content in (("LICENSE", "MIT"), ("corpus.py", "def load(): ..."), ("dataset_infos.json", "{}")):
        (folder / name).write_text(content)


def clone(folder: Path) -> None:
    write_repository(folder)
    (folder / ".gitattributes").write_text(ATTRIBUTES)
    (folder / "README.md").write_text("# A corpus\n")


def copy_without_hidden_files(folder: Path) -> None:
    write_repository(folder)
    (folder / "README.md").write_text(CARD)


def clones_in_a_folder(folder: Path) -> None:
    copy_without_hidden_files(folder / "one")
    shutil.rmtree(folder / "one" / "data")
    (folder / "one" / "a.jsonl").write_bytes(jsonl(TEXTS[:1]))
    (folder / "two").mkdir()
    (folder / "two" / "b.txt").write_text(TEXTS[1])
    (folder / "three").mkdir()
    (folder / "three" / "c.jsonl").write_bytes(jsonl(TEXTS[2:]))


def hub_cache(folder: Path) -> None:
    """What snapshot_download keeps in ~/.cache/huggingface/hub/datasets--NAME."""
    copy_without_hidden_files(folder / "snapshots" / "old")
    copy_without_hidden_files(folder / "snapshots" / "new")
    (folder / "snapshots" / "old" / "data" / "extra.parquet").write_bytes(parquet(["from an old revision"]))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("new")
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted((folder / "snapshots").rglob("*.*"))):
        blob = folder / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(blob)


LAYOUTS = [saved, saved_splits, cached, clone, copy_without_hidden_files, clones_in_a_folder, hub_cache]


@pytest.mark.parametrize("make", LAYOUTS)
def test_the_data_of_a_hugging_face_folder_is_read_and_nothing_else(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in")
    assert run("build", "--input", tmp_path / "in", "--out", tmp_path / "out", "strict=true", *OPTIONS) == 0
    assert all_documents(tmp_path / "out") == TEXTS
    assert f": {NO_DATA} (first: {tmp_path / 'in'}" in capsys.readouterr().out


@pytest.mark.parametrize("make", [saved, clone])
def test_metadata_is_not_read_as_text_where_the_format_is_given(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "in")
    found = list(read_all(tmp_path / "in", format="text"))
    assert not [item for item in found if isinstance(item, DocumentPiece)]
    assert {item.reason for item in skipped(iter(found))} == {NO_DATA, "binary"}


@pytest.mark.parametrize("make", [saved, copy_without_hidden_files])
def test_a_hugging_face_folder_in_a_store_is_read_alike(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "in")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "in"), f"/{make.__name__}", recursive=True)
    items = list(read_all(f"memory://{make.__name__}"))
    assert sorted(item.text for item in items if isinstance(item, DocumentPiece)) == TEXTS
    assert {item.reason for item in skipped(iter(items))} == {NO_DATA}
    store.rm(f"/{make.__name__}", recursive=True)


def test_files_of_a_clone_are_read_when_the_user_selects_or_names_them(tmp_path: Path) -> None:
    clone(tmp_path / "in")
    assert texts_of(read_all(tmp_path / "in", include=("*.md",))) == ["# A corpus\n"]
    assert texts_of(read_all(tmp_path / "in", include=("LICENSE",))) == ["MIT"]


@pytest.mark.parametrize("make", [clone, copy_without_hidden_files])
@pytest.mark.parametrize("name", ["README.md", "LICENSE", "corpus.py"])
def test_what_is_about_a_clone_is_refused_by_its_name(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "in")
    (tmp_path / "in" / "dataset_infos.json").unlink()
    folder = re.escape(str(tmp_path / "in"))
    with pytest.raises(
        UserError, match=f"but no data; give the folder {folder}, or, .* --input {folder} and include={name}$"
    ):
        list(read_all(tmp_path / "in" / name))


def test_metadata_that_a_glob_of_the_shell_names_is_refused_with_the_folder(tmp_path: Path) -> None:
    clone(tmp_path / "in")
    folder = re.escape(str(tmp_path / "in"))
    with pytest.raises(
        UserError, match=f"dataset_infos.json is metadata of a Hugging Face .*; give the folder {folder}$"
    ):
        list(read_all(tmp_path / "in" / "dataset_infos.json"))


@pytest.mark.parametrize("tracked", ["*.png", "*.parquet", "*.arrow"])
def test_a_source_tree_keeps_its_readme_and_license(tracked: str, tmp_path: Path) -> None:
    (tmp_path / ".gitattributes").write_text(f"{tracked} filter=lfs diff=lfs merge=lfs -text\n")
    for name in ("LICENSE", "README.md", "a.py"):
        (tmp_path / name).write_text(name)
    assert texts_of(read_all(tmp_path)) == ["LICENSE", "README.md", "a.py"]


def test_a_clone_keeps_its_data_whatever_its_ending(tmp_path: Path) -> None:
    clone(tmp_path / "in")
    for name in ("wiki.train.tokens", "code/a.py", "licenses.md", "notes.md"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    items = list(read_all(tmp_path / "in"))
    found = {item.text for item in items if isinstance(item, DocumentPiece)}
    assert found == {*TEXTS, "wiki.train.tokens", "code/a.py", "licenses.md", "notes.md"}
    assert len(skipped(iter(items))) == 4  # README.md, LICENSE, the loading script, dataset_infos.json


def test_a_saved_dataset_that_was_copied_in_part_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "in")
    (tmp_path / "in" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json lists data-00001-of-00002\.arrow, which is not there; copy it"):
        list(read_all(tmp_path / "in"))


def test_a_snapshot_that_was_downloaded_in_part_is_refused(tmp_path: Path) -> None:
    hub_cache(tmp_path / "in")
    snapshot = tmp_path / "in" / "snapshots" / "new"
    assert texts_of(item for item in read_all(snapshot) if isinstance(item, DocumentPiece)) == TEXTS
    (snapshot / "data" / "train-00001-of-00002.parquet").resolve().unlink()
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet is not downloaded, or not to its end"):
        list(read_all(tmp_path / "in"))


def test_one_of_several_revisions_must_be_given(tmp_path: Path) -> None:
    hub_cache(tmp_path / "in")
    (tmp_path / "in" / "refs" / "main").unlink()
    with pytest.raises(UserError, match=r"snapshots holds several revisions: new, old; give the folder of one"):
        list(read_all(tmp_path / "in"))


def test_a_file_of_ours_beside_arrow_files_is_no_state_of_a_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps([{"text": "our own"}]))
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["of a table"]}))
    assert texts_of(read_all(tmp_path)) == ["of a table", "our own"]
