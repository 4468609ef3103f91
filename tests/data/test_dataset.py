"""The stream is the documents, one after the other, whatever the shards and batches; damage is refused by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_support import VOCAB_SIZE, small_tokenizer, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.storage.shard_writer import ShardRow, ShardWriter, narrow
from megagpt.data.dataset import Dataset, TokenStream, open_dataset
from megagpt.data.manifest import Manifest, read_manifest, write_manifest
from megagpt.data.shard_format import ShardHeader, token_dtype
from megagpt.errors import UserError

EOD = 2
SHARD = "train/v0/shard-000000.arrow"
OTHER_SHARD = "train/v0/shard-000001.arrow"


def random_documents(n: int, *, longest: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(3, VOCAB_SIZE, rng.integers(0, longest)), EOD) for _ in range(n)]


DOCUMENTS = random_documents(40)
FLAT = np.concatenate(DOCUMENTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    write_dataset(folder, DOCUMENTS)
    return folder


@pytest.fixture(scope="module")
def stream(written: Path) -> TokenStream:
    return open_dataset(written).stream("train")


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "corpus"))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.int64, np.int32, np.uint16]))
def test_any_window_is_that_stretch_of_the_documents(
    stream: TokenStream, data: st.DataObject, dtype: type[np.integer]
) -> None:
    start = data.draw(st.integers(0, len(FLAT)))
    length = data.draw(st.integers(0, len(FLAT) - start))
    out = np.zeros(length, dtype)
    stream.copy(start, out)
    np.testing.assert_array_equal(out, FLAT[start : start + length])


def test_documents_come_back_as_they_were_written(stream: TokenStream) -> None:
    assert (stream.n_rows, stream.n_tokens) == (40, len(FLAT))
    for i, ids in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(stream.row(i), ids)
    assert [len(ids) for ids in stream.documents()] == [len(ids) for ids in DOCUMENTS]


def test_nothing_outside_the_stream_can_be_read(stream: TokenStream) -> None:
    for start in (-1, len(FLAT) - 9, len(FLAT) + 1):
        with pytest.raises(IndexError, match="not within"):
            stream.copy(start, np.zeros(10, np.int64))
    for i in (-1, 40):
        with pytest.raises(IndexError, match="not within"):
            stream.row(i)


def test_reading_copies_nothing_on_the_way(written: Path) -> None:
    dataset = open_dataset(written)
    before = pa.total_allocated_bytes()
    stream = dataset.stream("train")
    stream.copy(0, np.zeros(stream.n_tokens, np.int64))
    document = stream.row(7)
    assert pa.total_allocated_bytes() == before
    assert not document.flags.owndata
    assert not document.flags.writeable


def test_threads_may_share_a_stream(written: Path) -> None:
    stream = open_dataset(written).stream("train")

    def read(start: int) -> np.ndarray:
        out = np.zeros(100, np.int64)
        stream.copy(start, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        for start, out in enumerate(pool.map(read, range(len(FLAT) - 100))):
            np.testing.assert_array_equal(out, FLAT[start : start + 100])


def test_index_and_manifest_worked_out_by_hand(tmp_path: Path) -> None:
    lengths = [3, 2, 4, 1, 5]  # two shards: 3+2+4 and 1+5 tokens; a batch of at most 5 tokens is 3+2, 4, 1, 5
    documents = [np.append(np.full(n - 1, 7), EOD) for n in lengths]
    manifest = write_dataset(tmp_path / "corpus", documents, batch_tokens=5)
    rows = open_dataset(tmp_path / "corpus").index_rows("train")
    columns = ["shard", "batch", "row0", "tok0", "n_rows", "n_tokens"]
    assert [[row[name] for name in columns] for row in rows] == [
        [0, 0, 0, 0, 2, 5],
        [0, 1, 2, 5, 1, 4],
        [1, 0, 3, 9, 1, 1],
        [1, 1, 4, 10, 1, 5],
    ]
    train = manifest.splits["train"]
    assert (train.documents, train.tokens) == (5, 15)
    assert [(shard.documents, shard.tokens, shard.batches) for shard in train.variants[0].shards] == [
        (3, 9, 2),
        (2, 6, 2),
    ]
    assert manifest.splits["train"].variants[0].shards[1].path == OTHER_SHARD


def test_a_document_longer_than_a_batch_is_one_row(tmp_path: Path) -> None:
    documents = [np.array([5, EOD]), np.append(np.full(500, 9), EOD), np.array([6, EOD])]
    write_dataset(tmp_path / "corpus", documents, n_shards=1, batch_tokens=100)
    stream = open_dataset(tmp_path / "corpus").stream("train")
    assert [len(stream.row(i)) for i in range(3)] == [2, 501, 2]


def test_a_shard_is_a_plain_arrow_file_of_the_promised_schema(written: Path) -> None:
    reader = pa.ipc.open_file(pa.memory_map(str(written / SHARD)))
    ids = pa.field("item", pa.uint16(), nullable=False)
    assert reader.schema.field("tokens") == pa.field("tokens", pa.large_list(ids), nullable=False)
    assert reader.schema.field("doc") == pa.field("doc", pa.binary(16), nullable=False)
    assert reader.schema.field("source") == pa.field("source", pa.uint16(), nullable=False)
    assert reader.schema.field("part") == pa.field("part", pa.uint32(), nullable=False)
    metadata = json.loads(reader.schema.metadata[b"megagpt"])
    assert (metadata["format"], metadata["version"], metadata["eod_id"]) == ("megagpt-arrow", 1, EOD)
    reader.read_all().validate(full=True)


def test_ids_take_16_bits_up_to_a_vocabulary_of_65536(tmp_path: Path) -> None:
    assert [token_dtype(n) for n in (300, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    documents = [np.array([70_000, EOD])]
    write_dataset(tmp_path / "corpus", documents, n_shards=1, vocab_size=70_001)
    stream = open_dataset(tmp_path / "corpus").stream("train")
    assert stream.row(0).tolist() == [70_000, EOD]
    assert stream.row(0).dtype == np.uint32


@pytest.mark.parametrize("wrong", [VOCAB_SIZE, 65536 + 5, -1])
def test_an_id_outside_the_vocabulary_is_never_written(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"do not fit a vocabulary of {VOCAB_SIZE}"):
        narrow(np.array([5, wrong, EOD]), VOCAB_SIZE)


def test_a_document_without_its_end_is_never_written(tmp_path: Path) -> None:
    header = open_header(tmp_path)
    with pytest.raises(ValueError, match="does not end in the end-of-document id 2"):
        ShardWriter(tmp_path / "a.arrow", header).add(ShardRow(np.array([5, 6]), bytes(16), 0))


def test_a_shard_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    header = open_header(tmp_path)
    writer = ShardWriter(tmp_path / "a.arrow", header)
    writer.add(ShardRow(np.array([5, EOD]), bytes(16), 0))
    assert not (tmp_path / "a.arrow").exists()
    writer.close()
    assert (tmp_path / "a.arrow").exists()


def test_a_long_document_in_parts_reads_as_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.arrow", open_header(tmp_path), batch_tokens=4)
    rows = [[5, EOD], [6, 6, 6], [7, 7], [8, EOD], [9, EOD]]
    for part, ids in enumerate(rows):
        writer.add(
            ShardRow(np.array(ids), bytes(16), 0, part=max(0, part - 1) if part < 4 else 0, is_last=ids[-1] == EOD)
        )
    info, index = writer.close()
    assert (info.documents, info.tokens, sum(row["n_rows"] for row in index)) == (3, 11, 5)


def open_header(folder: Path) -> ShardHeader:
    write_dataset(folder / "other", DOCUMENTS)
    return open_dataset(folder / "other").header("train", 0, 9)


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest as somebody who recomputes its sha256 would."""
    raw = read_manifest(folder).model_dump(mode="json")
    change(raw)
    write_manifest(folder, Manifest.model_validate(raw))


def test_the_fingerprint_is_of_the_data_and_not_of_the_day(written: Path, damaged: Path) -> None:
    rewrite(damaged, lambda raw: raw.update(created="2027-01-01", tool="another"))
    assert open_dataset(damaged).fingerprint == open_dataset(written).fingerprint
    rewrite(damaged, lambda raw: raw["splits"]["train"].update(documents=41))
    assert open_dataset(damaged).fingerprint != open_dataset(written).fingerprint


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 8)


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


def unfinish(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".build").mkdir()


def newer_version(folder: Path) -> None:
    replace_text("manifest.json", '"version": 1', '"version": 2')(folder)


def lead_out(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "secret.arrow")
    rewrite(folder, lambda raw: raw["splits"]["train"]["variants"][0]["shards"][0].update(path="../secret.arrow"))


def link_out(folder: Path) -> None:
    shutil.move(folder / "train", folder.parent / "elsewhere")
    (folder / "train").symlink_to(folder.parent / "elsewhere")


def another_index(folder: Path) -> None:
    (folder / "index.arrow").write_bytes(content := b"no Arrow")
    rewrite(folder, lambda raw: raw.update(index_sha256=hashlib.sha256(content).hexdigest()))


def another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(small_tokenizer("bpe").model_bytes)


REFUSED_AT_OPEN = {
    "no folder": (shutil.rmtree, r"no dataset folder .*make it with `python -m data_tools build"),
    "no dataset": (
        remove("manifest.json"),
        r"is not a dataset: it has no manifest\.json; make one with .* --input (.*) --out \1_dataset`",
    ),
    "unfinished": (unfinish, r"is an unfinished build.*run again `python -m data_tools build"),
    "manifest edited": (
        replace_text("manifest.json", '"documents": 40', '"documents": 41'),
        r"manifest\.json was edited",
    ),
    "manifest cut": (truncate("manifest.json"), r"manifest\.json is damaged"),
    "manifest nested": (
        lambda folder: (folder / "manifest.json").write_text("[" * 10**5),
        r"manifest\.json is damaged",
    ),
    "manifest of another": (replace_text("manifest.json", "megagpt-arrow", "x"), r"not the manifest of a megagpt"),
    "newer version": (newer_version, r"format version 2, and this megagpt reads 1"),
    "path leads out": (lead_out, r"'\.\./secret\.arrow', which leads out"),
    "link leads out": (link_out, r"which leads out of its folder"),
    "shard missing": (remove(OTHER_SHARD), rf"{OTHER_SHARD} is missing"),
    "shard truncated": (truncate(SHARD), rf"{SHARD} has [\d,]+ bytes instead of"),
    "index missing": (remove("index.arrow"), r"index\.arrow is missing or damaged"),
    "index truncated": (truncate("index.arrow"), r"index\.arrow is missing or damaged"),
    "index signed anew": (another_index, r"index\.arrow is damaged"),
    "tokenizer missing": (remove("tokenizer.model"), r"tokenizer\.model is not the tokenizer this data"),
    "tokenizer replaced": (another_tokenizer, r"tokenizer\.model is not the tokenizer this data"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED_AT_OPEN.values(), ids=REFUSED_AT_OPEN)
def test_damage_is_refused_at_open(damaged: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(damaged)
    with pytest.raises(UserError, match=message):
        open_dataset(damaged)


def read_all(dataset: Dataset) -> None:
    stream = dataset.stream("train")
    stream.copy(0, np.zeros(stream.n_tokens, np.int64))


def test_a_shard_in_anothers_place_is_refused_when_it_is_read(damaged: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", DOCUMENTS, build_id="b" * 32)
    shutil.copy(tmp_path / "other" / SHARD, damaged / SHARD)  # the same size: only its build_id differs
    with pytest.raises(UserError, match=rf"{SHARD} belongs to another build"):
        read_all(open_dataset(damaged))


def test_swapped_shards_are_refused_when_they_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus", [np.array([5, EOD]), np.array([6, EOD])])  # two shards of one size
    first, second = tmp_path / "corpus" / SHARD, tmp_path / "corpus" / OTHER_SHARD
    assert first.stat().st_size == second.stat().st_size
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)
    with pytest.raises(UserError, match=rf"{SHARD} belongs to .* another place"):
        read_all(open_dataset(tmp_path / "corpus"))


def test_a_shard_truncated_after_the_open_is_refused_and_kills_nothing(damaged: Path) -> None:
    dataset = open_dataset(damaged)
    truncate(SHARD)(damaged)
    with pytest.raises(UserError, match=rf"{SHARD} has [\d,]+ bytes instead of"):
        read_all(dataset)


def test_an_empty_split_has_no_index_rows(written: Path) -> None:
    assert open_dataset(written).index_rows("val") == []


def test_an_empty_split_says_what_to_do(written: Path) -> None:
    with pytest.raises(UserError, match=r"no documents in its 'val' split; build it .*val_fraction"):
        open_dataset(written).stream("val")


def test_a_link_that_stays_inside_the_folder_is_followed(damaged: Path) -> None:
    (damaged / SHARD).rename(damaged / "kept.arrow")
    (damaged / SHARD).symlink_to(damaged / "kept.arrow")
    assert np.array_equal(np.concatenate(list(open_dataset(damaged).stream("train").documents())), FLAT)


@pytest.mark.process
def test_reading_does_not_import_pandas(written: Path) -> None:
    """Arrow's own conversions do, wherever it is installed: half a second and tens of megabytes."""
    code = (
        "import sys; from pathlib import Path; import numpy as np; from megagpt.data.dataset import open_dataset\n"
        "stream = open_dataset(Path(sys.argv[1])).stream('train'); stream.copy(0, np.empty(stream.n_tokens, int))\n"
        "print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, written], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
