"""From files to a dataset and back: nothing lost, the same bytes with any workers, every mistake named."""

import gzip
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import all_documents, document, documents_of, run, shard_bytes, small_tokenizer, write_texts
from distributed import LocalCluster
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data_tools.read
import data_tools.tokenization
import data_tools.workers
from data_tools.build import build
from data_tools.config import BuildConfig, ReadConfig
from data_tools.read import Document, find_files, plan_units, read_unit
from data_tools.tokenization import cut, split_of
from megagpt.data_manifest import SPLITS
from megagpt.shards import open_dataset

ROOT = Path(__file__).parents[1]


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


def write_gz(path: Path, texts: list[str]) -> None:
    write_jsonl(path.with_suffix(""), texts)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


def write_zst(path: Path, texts: list[str]) -> None:
    write_jsonl(path.with_suffix(""), texts)
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(path.with_suffix("").read_bytes())


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=3)


FORMATS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path, model: Path) -> None:
    texts = [document(i, n_words=20) for i in range(20)]
    FORMATS[name](tmp_path / name, texts)
    build([tmp_path / name], tmp_path / "out", BuildConfig(tokenizer=model))
    assert all_documents(tmp_path / "out") == sorted(texts)


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
    unit_bytes=st.integers(1, 200),
    final_newline=st.booleans(),
)
def test_jsonl_cut_anywhere_yields_each_line_once(
    texts: list[str], unit_bytes: int, final_newline: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    assume(texts or final_newline)  # an empty file is refused
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes((lines + "\n" * final_newline).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tools.read, "MIN_UNIT_BYTES", unit_bytes)
        units = plan_units(find_files([path], ReadConfig()))
    items = [item for unit in units for item in read_unit(unit, ReadConfig())]
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.text for item in documents] == [text for text in texts if text.strip()]
    assert len({item.position for item in documents}) == len(documents)
    assert len(items) == len(texts)


@given(text=st.text(st.sampled_from("ab\n"), min_size=1, max_size=60))
def test_one_text_can_be_cut_into_documents_without_losing_a_byte(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    config = ReadConfig(split_text_at="\n\n")
    [unit] = plan_units(find_files([path], config))
    documents = [item.text for item in read_unit(unit, config) if isinstance(item, Document)]
    blank = len(text) - sum(map(len, documents))
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")
    assert blank <= text.count("\n")
    assert all(part.find("\n\n") in (-1, len(part) - 2) for part in documents)


@given(text=st.text(st.sampled_from("ab \n\u00e9"), max_size=60), most=st.integers(1, 10))
def test_cut_pieces_make_the_text_again_and_end_at_white_space(text: str, most: int) -> None:
    pieces = cut(text, most)
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for piece in pieces[:-1]:
        assert piece[-1] in " \n" or not set(piece) & set(" \n")


def test_a_document_of_many_pieces_is_one_document(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.tokenization, "PIECE", 64)
    texts = write_texts(tmp_path / "in", 3, n_words=400)
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0))
    assert all_documents(tmp_path / "out") == sorted(texts)
    assert open_dataset(tmp_path / "out").stream("train").n_rows == 3


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


def test_one_worker_and_two_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.workers, "SMALL_BYTES", 0)
    monkeypatch.setattr(data_tools.read, "MIN_UNIT_BYTES", 2000)
    write_texts(tmp_path / "in", 60)
    for workers in (1, 2):
        options = BuildConfig(vocab_size=300, val_fraction=0.2, shard_tokens=2000, workers=workers)
        build([tmp_path / "in"], tmp_path / f"out{workers}", options)
    one, two = shard_bytes(tmp_path / "out1"), shard_bytes(tmp_path / "out2")
    assert one == two
    assert len([name for name in one if name.startswith("train")]) > 2
    assert open_dataset(tmp_path / "out1").fingerprint == open_dataset(tmp_path / "out2").fingerprint


def test_a_running_scheduler_writes_the_same_bytes(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path / "in", 20)
    build([tmp_path / "in"], tmp_path / "here", BuildConfig(tokenizer=model))
    cluster = LocalCluster(
        n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )
    with cluster:
        build([tmp_path / "in"], tmp_path / "there", BuildConfig(tokenizer=model), cluster.scheduler_address)
    assert shard_bytes(tmp_path / "here") == shard_bytes(tmp_path / "there")


def test_units_do_not_change_the_order_of_documents(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in", 30)
    build([tmp_path / "in"], tmp_path / "one", BuildConfig(tokenizer=model))
    monkeypatch.setattr(data_tools.read, "MIN_UNIT_BYTES", 500)
    monkeypatch.setattr(data_tools.tokenization, "PART_TOKENS", 100)
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
    options = BuildConfig(tokenizer=model, val_fraction=0.3, test_fraction=0.3)
    build([tmp_path / "a.jsonl"], tmp_path / "out", options)
    splits = [set(texts) for texts in documents_of(tmp_path / "out").values()]
    assert len(splits) == 3
    assert sum(map(len, splits)) == 20
    assert len(set.union(*splits)) == 20


def test_split_fractions_are_of_the_documents() -> None:
    options = BuildConfig(val_fraction=0.1, test_fraction=0.05)
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


def test_a_killed_build_is_unfinished_and_the_next_one_succeeds(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path / "in", 40)
    stop_at_the_third_unit = (
        "import sys, time, data_tools.build as build, data_tools.read as read\n"
        "from data_tools.__main__ import main\n"
        "tokenize_unit = build.tokenize_unit\n"
        "def slow(unit, number, *rest):\n"
        "    return time.sleep(600) if number == 2 else tokenize_unit(unit, number, *rest)\n"
        "build.tokenize_unit = slow\n"
        "read.MIN_UNIT_BYTES = 2000\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    arguments = ["build", "--input", str(tmp_path / "in"), "--out", str(out), f"tokenizer={model}"]
    process = subprocess.Popen([sys.executable, "-c", stop_at_the_third_unit, *arguments], cwd=ROOT)
    while not (out / ".build" / "part-000001-000.arrow").exists():
        assert process.poll() is None, "the build ended before it was killed"
        time.sleep(0.01)
    assert run(*arguments) == 2  # it is still being written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    assert run("verify", out) == 2
    assert run(*arguments) == 0
    assert run("verify", out) == 0
    assert not (out / ".build").exists()
    build([tmp_path / "in"], tmp_path / "clean", BuildConfig(tokenizer=model))
    assert shard_bytes(out) == shard_bytes(tmp_path / "clean")


@pytest.mark.parametrize("command", ["build", "train-tokenizer", "verify", "inspect"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    assert f"example:\n  python -m data_tools {command} " in capsys.readouterr().out


def test_the_command_line_prints_one_message_and_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, data_tools.__main__ as m; c = m.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(c)"
    )
    command = [sys.executable, "-c", script, "verify", str(tmp_path / "no")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("error: there is no dataset folder")
    assert done.stderr.count("\n") == 1
