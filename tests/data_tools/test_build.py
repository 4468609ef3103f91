"""A build from files to a dataset and back: nothing is lost, any number of workers gives the same bytes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from data_support import all_documents, document, documents_of, run, shard_bytes, small_tokenizer, write_texts
from distributed import LocalCluster
from support import PROGRAMS, ROOT

import data_tools.executor.dask_cluster
import data_tools.executor.workers
import data_tools.readers.document_pieces
import data_tools.readers.formats.plain_text
import data_tools.readers.work_units
import data_tools.stages.tokenize
from data_tools.__main__ import COMMANDS
from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.executor.dask_cluster import connect, run_on
from data_tools.executor.progress import Progress, advance
from data_tools.stages.select import SplitConfig, split_of
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import SPLITS
from megagpt.data.provenance import origins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished dataset with all three splits."""
    texts = tmp_path_factory.mktemp("texts")
    write_texts(texts, 40)
    out = tmp_path_factory.mktemp("data") / "corpus"
    build([texts], out, BuildConfig(tokenizer=model, val_fraction=0.2, test_fraction=0.2))
    return out


@pytest.fixture
def damaged(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


# --- what goes in comes out -----------------------------------------------------------------------------------


def test_every_document_comes_back_once_and_counts_are_right(corpus: Path) -> None:
    texts = [document(i) for i in range(40)]
    assert all_documents(corpus) == sorted(texts)
    report = json.loads((corpus / "report.json").read_text())
    tokens = sum(len(small_tokenizer().encode(text)) + 1 for text in texts)
    assert (report["documents"], report["tokens"]) == (40, tokens)
    assert report["bytes"] == sum(len(text.encode()) for text in texts)
    dataset = open_dataset(corpus)
    for split, texts in documents_of(corpus).items():
        info = dataset.manifest.splits[split]
        assert (info.documents, info.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert info.tokens == sum(len(small_tokenizer().encode(text)) + 1 for text in texts)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


def test_a_document_of_many_pieces_is_one_document(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (data_tools.readers.document_pieces, data_tools.readers.formats.plain_text):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(data_tools.stages.tokenize, "FILE_TOKENS", 100)  # so that one unit becomes several token files
    texts = write_texts(tmp_path / "in", 3, n_words=400)
    report = build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0))
    assert all_documents(tmp_path / "out") == sorted(texts)
    assert report["documents"] == 3
    assert open_dataset(tmp_path / "out").stream("train").n_rows > 30
    assert run("verify", tmp_path / "out") == 0


def test_a_source_tree_is_read_without_its_caches_and_binaries(tmp_path: Path, model: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("a.py", "b/c.py", ".git/d.py", "b/__pycache__/e.py", "site-packages/f.py", ".hidden.py", "g.md"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"# {name}\n")
    (tree / "binary.py").write_bytes(b"\x7fELF\0\0")
    (tree / "latin.py").write_bytes(b"# caf\xe9\n")
    (tree / "empty.py").write_bytes(b"")
    (tree / "link.py").symlink_to(tree / "a.py")
    options = BuildConfig(tokenizer=model, include="*.py", val_fraction=0)
    report = build([tree], tmp_path / "out", options)
    assert all_documents(tmp_path / "out") == ["# a.py\n", "# b/c.py\n"]
    assert {reason: skipped["documents"] for reason, skipped in report["skipped"].items()} == {
        "binary": 1,
        "empty": 1,
        "not UTF-8": 1,
    }
    assert report["skipped"]["not UTF-8"]["first"] == str(tree / "latin.py")


# --- determinism ----------------------------------------------------------------------------------------------


@pytest.mark.process
def test_one_worker_and_two_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.executor.workers, "SMALL_BYTES", 0)
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 2000)
    write_texts(tmp_path / "in", 60)
    for workers in (1, 2):
        options = BuildConfig(vocab_size=300, val_fraction=0.2, shard_tokens=2000, workers=workers)
        build([tmp_path / "in"], tmp_path / f"out{workers}", options)
    one, two = shard_bytes(tmp_path / "out1"), shard_bytes(tmp_path / "out2")
    assert one == two
    assert len([name for name in one if name.startswith("train")]) > 2
    assert open_dataset(tmp_path / "out1").fingerprint == open_dataset(tmp_path / "out2").fingerprint


SEEN = threading.Event()


class Seen(Progress):
    def set(self, task: int, done: int) -> None:
        super().set(task, done)
        if self.n == 7:
            SEEN.set()


def read_some_and_wait(n: int) -> bool:
    advance(n)
    return SEEN.wait(60)


@pytest.mark.process
def test_a_running_scheduler_writes_the_same_bytes_and_passes_progress_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in", 20)
    build([tmp_path / "in"], tmp_path / "here", BuildConfig(tokenizer=model))
    cluster = LocalCluster(
        n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )
    with cluster:
        build([tmp_path / "in"], tmp_path / "there", BuildConfig(tokenizer=model), cluster.scheduler_address)
        monkeypatch.setattr(data_tools.executor.dask_cluster, "REPORT_EVERY", 0.0)
        with connect(1, cluster.scheduler_address, tmp_path) as client:
            progress = Seen("reading", [10], unit="B")
            # the task ends when this process has its progress
            assert run_on(client, read_some_and_wait, [(7,)], progress) == [True]
    assert progress.n == progress.total
    assert shard_bytes(tmp_path / "here") == shard_bytes(tmp_path / "there")


def test_units_do_not_change_the_order_of_documents(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in", 30)
    build([tmp_path / "in"], tmp_path / "one", BuildConfig(tokenizer=model))
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 500)
    monkeypatch.setattr(data_tools.stages.tokenize, "FILE_TOKENS", 100)
    build([tmp_path / "in"], tmp_path / "many", BuildConfig(tokenizer=model))
    assert documents_of(tmp_path / "one") == documents_of(tmp_path / "many")


def test_the_order_is_shuffled_and_follows_the_seed(tmp_path: Path, model: Path) -> None:
    texts = write_texts(tmp_path / "in", 30)
    orders = []
    for seed in (1, 2):
        build([tmp_path / "in"], tmp_path / f"{seed}", BuildConfig(tokenizer=model, val_fraction=0, seed=seed))
        orders.append(documents_of(tmp_path / f"{seed}")["train"])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(texts)
    assert orders[0] != orders[1]
    assert texts not in orders


def test_equal_documents_fall_into_one_split(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [document(i % 20) for i in range(100)])
    options = BuildConfig(tokenizer=model, val_fraction=0.3, test_fraction=0.3, dedup={"method": "none"})
    build([tmp_path / "a.jsonl"], tmp_path / "out", options)
    assert len(all_documents(tmp_path / "out")) == 100
    splits = [set(texts) for texts in documents_of(tmp_path / "out").values()]
    assert len(splits) == 3
    assert sum(map(len, splits)) == 20
    assert len(set.union(*splits)) == 20


def test_split_fractions_are_of_the_documents() -> None:
    options = SplitConfig(val_fraction=0.1, test_fraction=0.05, duplicates="remove", seed=1)
    splits = [split_of(hashlib.blake2b(bytes([i % 256, i // 256])).digest()[:16], options) for i in range(10_000)]
    # binomial: one standard deviation is 30 and 22 of 10,000
    assert splits.count("val") == pytest.approx(1000, abs=120)
    assert splits.count("test") == pytest.approx(500, abs=90)


# --- damage, crashes, commands --------------------------------------------------------------------------------


def test_a_sound_dataset_is_verified_and_shown(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", corpus) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run("inspect", corpus, "--split", "val", "--documents", "1") == 0
    assert documents_of(corpus)["val"][0] in capsys.readouterr().out
    assert run("inspect", corpus, "--json", "--documents", "2") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["documents"] == documents_of(corpus)["train"][:2]
    assert shown["fingerprint"] == open_dataset(corpus).fingerprint


FILES = [
    *("manifest.json", "tokenizer.model", "index.arrow", "report.json"),
    *(f"{split}/v0/shard-000000.arrow" for split in SPLITS),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.03, 0.2, 0.5, 0.8, 0.97, 1.0])
def test_a_flipped_bit_in_any_file_is_found_and_named(
    name: str, where: float, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[round(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    assert run("verify", damaged) == 2
    assert str(path) in capsys.readouterr().err


def test_a_flipped_token_is_traced_to_its_record_batch(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damaged / FILES[-3]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run("verify", damaged) == 2
    assert f"{path}: record batch 0 (tokens from 0 of train) has changed" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    assert f"example:\n  python -m data_tools {command} " in capsys.readouterr().out


@pytest.mark.process
def test_the_command_line_prints_one_message_and_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, data_tools.__main__ as m; c = m.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(c)"
    )
    command = [sys.executable, "-c", script, "verify", str(tmp_path / "no")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("error: there is no dataset folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.process
@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_damage_is_accepted_and_none_crashes_the_reader(n: int, damageable: Path, tmp_path: Path) -> None:
    """Run in a process of its own, which a read beyond a mapped file would kill with SIGBUS."""
    command = [sys.executable, PROGRAMS / "corrupt_files.py", "dataset", damageable, tmp_path / "scratch", n, 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"damages": n, "accepted": 0}


@pytest.fixture(scope="module")
def damageable(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A dataset with every kind of file: variants, several shards and batches, rejected documents, provenance."""
    folder = tmp_path_factory.mktemp("damageable")
    write_texts(folder / "in", 30)
    write_texts(folder / "in" / "copies", 5)
    options = BuildConfig(
        tokenizer=model, val_fraction=0.2, test_fraction=0.1, shard_tokens=2000, subword={"variants": 1}
    )
    build([folder / "in"], folder / "out", options)
    return folder / "out"


# --- who reads it ---------------------------------------------------------------------------------------------


def test_hugging_face_datasets_reads_the_shards(corpus: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    files = sorted(map(str, (corpus / "train" / "v0").glob("*.arrow")))
    loaded = load_dataset("arrow", data_files={"train": files}, split="train", cache_dir=str(tmp_path))
    stream = open_dataset(corpus).stream("train")
    assert [row["tokens"] for row in loaded] == [ids.tolist() for ids in stream.documents()]


def test_every_document_knows_where_it_came_from(damageable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, tokenizer = open_dataset(damageable), small_tokenizer()
    for split in SPLITS:
        stream = dataset.stream(split)
        found = list(origins(dataset, split, range(stream.n_rows)))
        texts = [tokenizer.decode(ids) for ids in stream.documents()]
        assert [Path(origin.file).read_text() for origin in found] == texts
        assert [origin.doc for origin in found] == [
            hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts
        ]
    assert run("inspect", damageable, "--documents", "1") == 0
    assert (
        f"--- train document 0, from in: {next(origins(dataset, 'train', [0])).file} at 0 " in capsys.readouterr().out
    )


def test_dropped_documents_are_kept_with_the_rule_that_dropped_them(damageable: Path) -> None:
    rows = []
    for path in sorted((damageable / "rejects").glob("*.jsonl.zst")):
        with pa.input_stream(str(path)) as file:
            rows += [json.loads(line) for line in file.read().splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(document(i) for i in range(5))
    assert {row["rule"] for row in rows} == {"exact duplicate"}
